"""The verifier: every lp node of a program against its declaration. Run between passes; the sentence of the broken
rule is the error.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from passes.ir.program import Program
from passes.ir.types import Types, declared_type, operand_types, seen_type, type_of
from runtime.errors import VerifyError
from runtime.numerics.specs import LayerSpec
from runtime.op_types import OpType, TensorType, accepts
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
        types: dict[fx.Node, OpType] = {}
        for node in graph.nodes:
            if node.op == "call_function" and node.target in OP_OF:
                verify_node(name, node, OP_OF[node.target], types)
            types[node] = type_of(node, types)


def verify_node(graph_name: str, node: fx.Node, op: OpDef, types: Types) -> None:
    """One lp node; `types` are those of the nodes before it."""
    where = f"{graph_name}: %{node.name} = {op.name}"
    if len(node.args) != len(op.operands):
        raise VerifyError(
            "wrong number of operands", where=where, expected=_listed(op.operands), got=str(len(node.args))
        )
    for operand, value in zip(op.operands, node.args):
        if not isinstance(value, fx.Node) and not (value is None and operand.is_optional):
            raise VerifyError(f"operand {operand.name} is missing", where=where, expected="a node", got=repr(value))
    declared = {attribute.name: attribute for attribute in op.attributes}
    required = {attribute.name for attribute in op.attributes if not attribute.is_optional}
    if not required <= set(node.kwargs) <= set(declared):
        raise VerifyError(
            "wrong attributes", where=where, expected=_listed(op.attributes), got=", ".join(sorted(node.kwargs))
        )
    for name, value in node.kwargs.items():
        if type(value) is not declared[name].kind:
            expected = f"{declared[name].kind.__name__}"
            raise VerifyError(f"attribute {name} has another type", where=where, expected=expected, got=repr(value))
    for rule in op.rules:
        if not rule.holds(dict(node.kwargs)):
            raise VerifyError(rule.sentence, where=where, got=str(dict(node.kwargs)))
    if op is OPS["lp.gemm"]:
        _verify_casts(where, node)
    _verify_types(where, node, op, types)


def _verify_types(where: str, node: fx.Node, op: OpDef, types: Types) -> None:
    operands = operand_types(node, types)
    for operand in op.operands:
        kind = operands[operand.name]
        if kind is not None and not accepts(operand.kind, kind):
            raise VerifyError(f"operand {operand.name} is no {operand.kind}", where=where, got=str(kind))
    for rule in op.type_rules:
        if not rule.holds(operands, dict(node.kwargs)):
            got = ", ".join(f"{name}: {kind}" for name, kind in operands.items() if kind)
            raise VerifyError(rule.sentence, where=where, got=got)
    try:
        declared = declared_type(node, types)
    except (RuntimeError, ValueError) as error:
        got = str(error).partition("\n")[0]
        raise VerifyError("the sizes of its operands do not fit", where=where, got=got) from error
    seen = seen_type(node)
    if isinstance(declared, TensorType) and isinstance(seen, TensorType) and declared.shape != seen.shape:
        what = "its shape is not what its operands give"
        raise VerifyError(what, where=where, expected=str(declared), got=str(seen))


def _verify_casts(where: str, gemm: fx.Node) -> None:
    """The casts that a GEMM multiplies are the casts that its spec names, as far as they are seen in the same graph."""
    spec = LayerSpec.parse(str(gemm.kwargs["spec"]))
    operands: dict[str, Any] = dict(zip((operand.name for operand in OPS["lp.gemm"].operands), gemm.args))
    wanted = {"fwd_lhs": spec.fwd.lhs, "fwd_rhs": spec.fwd.rhs, "bwd_rhs": spec.bwd.rhs, "grad_lhs": spec.grad.rhs}
    for name, quant in wanted.items():
        value = operands[name]
        if isinstance(value, fx.Node) and value.target is OPS["lp.quantize"].run and value.kwargs["spec"] != str(quant):
            got = str(value.kwargs["spec"])
            raise VerifyError(
                f"operand {name} is cast to another spec than the GEMM's", where=where, expected=str(quant), got=got
            )


def _listed(declared: Sequence[object]) -> str:
    return ", ".join(map(str, declared))
