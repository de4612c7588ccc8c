"""The lp dialect: each op declared once, with its operands, attributes, rules and reference.

    lp.scale       x -> s            the scale of a cast lp.quantize    x, s -> q         grid values: x / s rounded to
    the format, in the format's storage dtype lp.dequantize  q, s -> x         grid values times their scale lp.gemm
    lhs, rhs, ... -> y   the three GEMMs of one site; lhs and rhs carry the gradient, the casts carry the values

In a torch.fx graph an op is a `call_function` node whose target is the function below; operands are positional,
attributes are keywords. The verifier checks nodes against OPS; passes look ops up by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from runtime.contractions import Side
from runtime.gemms import KINDS, GemmPlan, Operand, contraction_of, parse_geometry, run_gemm, to_grid, varies_along_sum
from runtime.numerics.scaling import compute_scale, expand_scale
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec
from runtime.state import RunState


def scale(x: Tensor, *, spec: str) -> Tensor | None:
    """The scale of one cast of x, fp32: 0-dim for `tensor`, else broadcastable to x (or one per tile). Carries no
    gradient.
    """
    return compute_scale(x.detach(), QuantSpec.parse(spec))


def quantize(x: Tensor, s: Tensor | None, state: RunState | None, *, spec: str, site: int, slot: int) -> Tensor:
    """Grid values of x / s. `q * s` is the cast value. Saturates; NaN stays NaN. `site` and `slot` key the stochastic
    bits.
    """
    return to_grid(x, s, QuantSpec.parse(spec), state, site, slot)


def dequantize(q: Tensor, s: Tensor | None, *, spec: str) -> Tensor:
    """q * s in fp32."""
    parsed = QuantSpec.parse(spec)
    return q.float() if s is None else q.float() * expand_scale(s, q.shape, parsed)


def gemm(
    lhs: Tensor,
    rhs: Tensor,
    bias: Tensor | None,
    fwd_lhs: Tensor,
    fwd_lhs_scale: Tensor | None,
    fwd_rhs: Tensor,
    fwd_rhs_scale: Tensor | None,
    bwd_rhs: Tensor | None,
    bwd_rhs_scale: Tensor | None,
    grad_lhs: Tensor,
    grad_lhs_scale: Tensor | None,
    state: RunState,
    *,
    kind: str,
    spec: str,
    methods: str,
    site: int,
    geometry: str = "",
) -> Tensor:
    """One GEMM site, forward and backward. Returns y in the dtype of lhs; see runtime.gemms for the arithmetic."""
    plan = GemmPlan.parse(kind, spec, methods, site, geometry)
    layer = plan.spec
    casts = {
        "fwd_lhs": Operand(fwd_lhs, fwd_lhs_scale, layer.fwd.lhs),
        "fwd_rhs": Operand(fwd_rhs, fwd_rhs_scale, layer.fwd.rhs),
        "bwd_rhs": None if bwd_rhs is None else Operand(bwd_rhs, bwd_rhs_scale, layer.bwd.rhs),
        "grad_lhs": Operand(grad_lhs, grad_lhs_scale, layer.grad.rhs),
    }
    return run_gemm(lhs, rhs, bias, casts, state, plan)


@dataclass(frozen=True)
class Rule:
    """A trait of an op: the sentence is the error, `holds(attributes)` decides."""

    sentence: str
    holds: Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class OpDef:
    """One op. `operands` in order, those ending in `?` may be None; `attributes` are the keyword arguments a node
    must carry.
    """

    name: str
    run: Callable[..., Any]
    operands: tuple[str, ...]
    attributes: tuple[str, ...]
    optional_attributes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()


def _parses(attribute: str, parse: Callable[[str], Any]) -> Callable[[dict[str, Any]], bool]:
    def holds(attributes: dict[str, Any]) -> bool:
        try:
            parse(attributes[attribute])
        except Exception:
            return False
        return True

    return holds


def _scales_leave_the_sum(attributes: dict[str, Any]) -> bool:
    spec = LayerSpec.parse(attributes["spec"])
    geometry = parse_geometry(attributes.get("geometry", ""))
    kind = contraction_of(attributes["kind"], geometry)
    for role in ROLES:
        operands: tuple[tuple[Side, QuantSpec], ...] = (("lhs", spec.role(role).lhs), ("rhs", spec.role(role).rhs))
        for side, operand in operands:
            if operand.scale and operand.scale.rule != "pow2" and varies_along_sum(kind, role, side, operand):
                return False
    return True


_CAST_PARSES = Rule("`spec` must be a cast, `FORMAT ROUNDING [GRANULARITY/RULE]`", _parses("spec", QuantSpec.parse))

_GEMM_RULES = (
    Rule("`spec` must hold the three GEMMs, `fwd: ...; bwd: ...; grad: ...`", _parses("spec", LayerSpec.parse)),
    Rule(f"`kind` must be one of {', '.join(KINDS)}, conv", lambda a: a["kind"] in {*KINDS, "conv"}),
    Rule(
        "a convolution, and nothing else, has a `geometry`", lambda a: (a["kind"] == "conv") == bool(a.get("geometry"))
    ),
    Rule("a scale that varies along the sum must be a power of two", _scales_leave_the_sum),
    Rule("`methods` must name one method per role, fwd,bwd,grad", lambda a: len(a["methods"].split(",")) == 3),
)

OPS: dict[str, OpDef] = {
    op.name: op
    for op in (
        OpDef("lp.scale", scale, ("x",), ("spec",), rules=(_CAST_PARSES,)),
        OpDef("lp.quantize", quantize, ("x", "s?", "state?"), ("spec", "site", "slot"), rules=(_CAST_PARSES,)),
        OpDef("lp.dequantize", dequantize, ("q", "s?"), ("spec",), rules=(_CAST_PARSES,)),
        OpDef(
            "lp.gemm",
            gemm,
            (
                "lhs", "rhs", "bias?", "fwd_lhs", "fwd_lhs_scale?", "fwd_rhs", "fwd_rhs_scale?",
                "bwd_rhs?", "bwd_rhs_scale?", "grad_lhs", "grad_lhs_scale?", "state",
            ),
            ("kind", "spec", "methods", "site"),
            ("geometry",),
            _GEMM_RULES,
        ),
    )
}  # fmt: skip
"""Every op of the dialect by name."""

OP_OF: dict[Callable[..., Any], OpDef] = {op.run: op for op in OPS.values()}
"""The op that a graph node's target runs."""
