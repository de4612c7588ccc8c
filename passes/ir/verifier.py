"""The verifier: every lp node of a program against its declaration. Run between passes; the sentence of the broken
rule is the error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from passes.cast_keys import cast_spec, gemm_spec
from passes.ir.operands import operands_of
from passes.ir.program import GROUP, SITE, SPEC, Program, site_numbers
from passes.ir.stored_specs import spec_as_stored, without
from passes.ir.types import Types, declared_type, operand_types, seen_type, type_of
from runtime.errors import VerifyError, nearest_names
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, Role
from runtime.ops.declared import OpDef
from runtime.ops.dialect import OP_OF, OPS
from runtime.ops.plan import parse_geometry
from runtime.ops.types import VALUE, OpType, TensorType, accepts
from runtime.quantize.owners import operand_of, owner_of


def verify(program: Program) -> None:
    """Raise VerifyError at the first node that breaks a rule: malformed graph, operand count, attributes, traits,
    cast formats.
    """
    numbers = site_numbers(program)
    for name, graph in program.graphs():
        try:
            graph.lint()
        except (RuntimeError, AssertionError) as error:
            raise VerifyError(str(error), where=name, expected="a well-formed graph") from error
        types: dict[fx.Node, OpType] = {}
        for node in graph.nodes:
            if node.op == "call_function" and node.target in OP_OF:
                verify_node(name, node, OP_OF[node.target], types)
                verify_site(program, numbers, name, node)
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


def verify_site(program: Program, numbers: Mapping[str, int], graph_name: str, node: fx.Node) -> None:
    """What one lp node, which is verified, says of its site, against what the program says of it. `numbers` are those
    of `site_numbers(program)`.
    """
    op = OP_OF[node.target]  # type: ignore[index]
    where = f"{graph_name}: %{node.name} = {op.name}"
    if op is OPS["lp.quantize"]:
        _verify_key(where, node)
    if op is not OPS["lp.gemm"]:
        return
    site = node.meta.get(SITE)
    if site not in program.specs:
        what = "`lp.site` must name a site that the policy names"
        raise VerifyError(what, where=where, got=repr(site), hint=nearest_names(str(site), tuple(program.specs)))
    given = str(node.kwargs["spec"])
    geometry = parse_geometry(str(node.kwargs.get("geometry", "")))
    stored = spec_as_stored(str(node.kwargs["kind"]), geometry, program.specs[site])
    wanted = without(stored, program.refused_roles(site))
    if LayerSpec.parse(given) != wanted or node.meta.get(SPEC, wanted) != wanted:
        got = given if LayerSpec.parse(given) != wanted else f"lp.spec {node.meta[SPEC]}"
        raise VerifyError("`spec` must be that of its site", where=where, expected=str(wanted), got=got)
    _verify_quantizers(where, node, site)
    number = numbers[site] + node.meta.get(GROUP, 0) * len(numbers)
    if node.kwargs["site"] != number:
        what, got = "`site` must be the number of its site", str(node.kwargs["site"])
        raise VerifyError(what, where=where, expected=str(number), got=got)
    choices = program.choices.get(site)
    if choices and set(choices) == {*ROLES}:
        kernels = ",".join(choices[role].kernel for role in ROLES)
        if node.kwargs["kernels"] != kernels:
            what, got = "`kernels` must be those of the backends chosen for its site", str(node.kwargs["kernels"])
            raise VerifyError(what, where=where, expected=kernels, got=got)


def _verify_quantizers(where: str, gemm: fx.Node, site: str) -> None:
    """What a GEMM casts with a quantizer that has state is cast by its own: `quantizer` is SITE and the operand."""
    operands, spec = operands_of(gemm), gemm_spec(gemm)
    for operand, (role, side) in _QUANTIZED.items():
        wanted = owner_of(site, operand_of(spec, role, side))
        for value in (operands[operand], operands[f"{operand}_scale"]):
            given = value.kwargs.get("quantizer", wanted) if value is not None else wanted
            if given != wanted:
                what = f"operand {operand} must be cast by the quantizer of its site"
                raise VerifyError(what, where=where, expected=wanted, got=str(given))


def _verify_key(where: str, cast: fx.Node) -> None:
    """A cast that GEMMs alone read has the site and the slot of one of them: they key its stochastic bits, and what is
    kept of it.
    """
    key, scale = (cast.kwargs["site"], cast.kwargs["slot"]), cast.args[1]
    if isinstance(scale, fx.Node) and scale.target is OPS["lp.constant_scale"].run:
        kept = scale.kwargs["site"], scale.kwargs["slot"]
        if kept != key:
            what = "a kept scale must have the `site` and `slot` of its cast"
            raise VerifyError(what, where=where, expected=_print_key(*key), got=_print_key(*kept))
    allowed: set[tuple[Any, Any]] = set()
    for user in cast.users:
        if user.target is not OPS["lp.gemm"].run:
            return
        operands = operands_of(user)
        for name, slots in _SLOTS.items():
            if operands[name] is cast:
                allowed |= {(user.kwargs["site"], slot) for slot in slots}
    if allowed and key not in allowed:
        expected = " or ".join(_print_key(*each) for each in sorted(allowed))
        what = "`site` and `slot` must be those of a GEMM that reads the cast"
        raise VerifyError(what, where=where, expected=expected, got=_print_key(*key))


def _print_key(site: Any, slot: Any) -> str:
    return f"site {site} slot {slot}"


def _verify_types(where: str, node: fx.Node, op: OpDef, types: Types) -> None:
    operands = operand_types(node, types)
    for operand in op.operands:
        kind = operands[operand.name]
        if kind is not None and not accepts(operand.kind, kind):
            raise VerifyError(f"operand {operand.name} is no {operand.kind}", where=where, got=str(kind))
    try:
        broken = next((rule for rule in op.type_rules if not rule.holds(operands, dict(node.kwargs))), None)
        declared = VALUE if broken else declared_type(node, types)
    except (RuntimeError, ValueError) as error:  # of the sizes of a product, which rules ask for too
        got = str(error).partition("\n")[0]
        raise VerifyError("the sizes of its operands do not fit", where=where, got=got) from error
    if broken is not None:
        got = ", ".join(f"{name}: {kind}" for name, kind in operands.items() if kind)
        raise VerifyError(broken.sentence, where=where, got=got)
    seen = seen_type(node)
    if isinstance(declared, TensorType) and isinstance(seen, TensorType) and declared.shape != seen.shape:
        what = "its shape is not what its operands give"
        raise VerifyError(what, where=where, expected=str(declared), got=str(seen))


def _verify_casts(where: str, gemm: fx.Node) -> None:
    """The casts that a GEMM multiplies are the casts that its spec names, as far as they are seen in the same graph."""
    spec = gemm_spec(gemm)
    operands = operands_of(gemm)
    wanted = {"fwd_lhs": spec.fwd.lhs, "fwd_rhs": spec.fwd.rhs, "bwd_rhs": spec.bwd.rhs, "grad_lhs": spec.grad.rhs}
    for name, quant in wanted.items():
        value = operands[name]
        if isinstance(value, fx.Node) and value.target is OPS["lp.quantize"].run and cast_spec(value) != quant:
            got = str(value.kwargs["spec"])
            raise VerifyError(
                f"operand {name} is cast to another spec than the GEMM's", where=where, expected=str(quant), got=got
            )


_QUANTIZED: dict[str, tuple[Role, Side]] = {
    "fwd_lhs": ("fwd", "lhs"), "fwd_rhs": ("fwd", "rhs"), "bwd_rhs": ("bwd", "rhs"), "grad_lhs": ("grad", "rhs")
}  # fmt: skip
"""Of each cast that a GEMM multiplies: which operand it is."""
_SLOTS = {"fwd_lhs": (0,), "fwd_rhs": (1,), "bwd_rhs": (1, 2), "grad_lhs": (0, 3)}
"""Of each cast that a GEMM multiplies: which slots it may have."""


def _listed(declared: Sequence[object]) -> str:
    return ", ".join(map(str, declared))
