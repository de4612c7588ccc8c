"""The verifier: every lp node of a program against its declaration. Run between passes; the sentence of the broken
rule is the error.
"""

from typing import Any

from torch import fx

from passes.ir.program import Program
from runtime.errors import VerifyError
from runtime.numerics.specs import LayerSpec
from runtime.ops import OP_OF, OPS, OpDef


def verify(program: Program) -> None:
    """Raise VerifyError at the first node that breaks a rule: malformed graph, operand count, attributes, traits,
    cast formats.
    """
    for name, graph in program.graphs():
        try:
            graph.lint()
        except (RuntimeError, AssertionError) as error:
            raise VerifyError(str(error), where=name, expected="a well-formed graph") from error
        for node in graph.nodes:
            if node.op == "call_function" and node.target in OP_OF:
                _verify_node(name, node, OP_OF[node.target])


def _verify_node(graph_name: str, node: fx.Node, op: OpDef) -> None:
    where = f"{graph_name}: %{node.name} = {op.name}"
    if len(node.args) != len(op.operands):
        raise VerifyError(
            "wrong number of operands", where=where, expected=", ".join(op.operands), got=str(len(node.args))
        )
    for operand, value in zip(op.operands, node.args):
        if not isinstance(value, fx.Node) and not (value is None and operand.endswith("?")):
            raise VerifyError(f"operand {operand} is missing", where=where, expected="a node", got=repr(value))
    given, required = set(node.kwargs), set(op.attributes)
    if not required <= given or not given <= required | set(op.optional_attributes):
        raise VerifyError(
            "wrong attributes", where=where, expected=", ".join(op.attributes), got=", ".join(sorted(given))
        )
    for rule in op.rules:
        if not rule.holds(dict(node.kwargs)):
            raise VerifyError(rule.sentence, where=where, got=str(dict(node.kwargs)))
    if op is OPS["lp.gemm"]:
        _verify_casts(where, node)


def _verify_casts(where: str, gemm: fx.Node) -> None:
    """The casts that a GEMM multiplies are the casts that its spec names, as far as they are seen in the same graph."""
    spec = LayerSpec.parse(str(gemm.kwargs["spec"]))
    operands: dict[str, Any] = dict(zip((name.rstrip("?") for name in OPS["lp.gemm"].operands), gemm.args))
    wanted = {"fwd_lhs": spec.fwd.lhs, "fwd_rhs": spec.fwd.rhs, "bwd_rhs": spec.bwd.rhs, "grad_lhs": spec.grad.rhs}
    for name, quant in wanted.items():
        value = operands[name]
        if isinstance(value, fx.Node) and value.target is OPS["lp.quantize"].run and value.kwargs["spec"] != str(quant):
            got = str(value.kwargs["spec"])
            raise VerifyError(
                f"operand {name} is cast to another spec than the GEMM's", where=where, expected=str(quant), got=got
            )
