"""The lp dialect: each op declared once, with its operands, attributes, rules and reference.

    lp.rotate          x -> x           x turned by the transform of a cast, which is then made of the result
    lp.scale           x -> s           the scale of a cast
    lp.constant_scale  x -> s           lp.scale of a weight, kept between uses (runtime/quantize/kept_casts.py)
    lp.learned_scale   x -> s           what a quantizer with state has for a scale; a gradient flows into the parameter
                                        of one that learns
    lp.carrier         x, s -> x        x with the derivatives, in x and s, of a cast whose scale is learned
    lp.quantize        x, s -> q        grid values: x / s rounded to the format, in the format's storage dtype
    lp.dequantize      q, s -> x        grid values times their scale
    lp.gemm            lhs, rhs, ... -> y   the three GEMMs of one site; lhs and rhs carry gradients, the casts values
    lp.stand_in        q -> x           what stands where a carrier of the gradient stood, and holds no values
    lp.norm_scale, lp.norm_shift, lp.fold_*     a batch norm moves into the weight next to it (batch_norm.py)

In a torch.fx graph an op is a `call_function` node whose target is the function below; operands are positional,
attributes are keywords. The function's signature is the declaration (runtime/ops/declared.py): the verifier, the
printer, the parser and the table in docs/ir.md read it through OPS; passes look ops up by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.registry import kernels
from runtime.numerics.free_axes import Side
from runtime.numerics.scaling import expand_scale
from runtime.numerics.specs import CAST_TEXT, ROLES, LayerSpec, QuantSpec
from runtime.ops import traced
from runtime.ops.activations import ACTIVATIONS
from runtime.ops.batch_norm import fold_bias, fold_input_bias, fold_weight, norm_scale, norm_shift
from runtime.ops.declared import Grid, OpDef, Rule, Scale, TypeRule
from runtime.ops.draws import draw_of
from runtime.ops.layer import check_transforms, run_gemm
from runtime.ops.plan import KINDS, GemmPlan, contraction_of, parse_geometry, print_geometry
from runtime.ops.sum_scales import why_not_scaled
from runtime.ops.types import (
    VALUE,
    Operands,
    QuantType,
    TensorType,
    dequantize_result,
    fold_bias_result,
    fold_weight_result,
    gemm_result,
    norm_result,
    quantize_result,
    rotate_result,
    same_as_x,
    scale_result,
    stand_in_result,
)
from runtime.quantize.kept_casts import LIFETIMES, Kept
from runtime.quantize.owners import OPERANDS
from runtime.quantize.qtensor import CastKey, QTensor
from runtime.quantize.quantizer import to_grid, turned
from runtime.state import RunState


def scale(x: Tensor, *, spec: str) -> Tensor | None:
    """The scale of one cast of x, fp32: 0-dim for `tensor`, else broadcastable to x (or one per tile). Carries no
    gradient.
    """
    if torch.compiler.is_compiling():
        return traced.scale(x, spec)
    parsed = QuantSpec.parse(spec)
    check_transforms(parsed.is_identity, x)
    return compute_scale(x.detach(), parsed)


def rotate(x: Tensor, state: RunState | None, *, spec: str, site: int, slot: int) -> Tensor:
    """x turned along the sum of its GEMM by the transform of one cast; lp.scale and lp.quantize of that cast read it in
    the place of x. `site` and `slot` are those of the lp.quantize, and key random signs. Carries no gradient.
    """
    if torch.compiler.is_compiling():
        return traced.rotate(x, state, spec, site, slot)
    parsed = QuantSpec.parse(spec)
    check_transforms(False, x)
    return turned(x, parsed, draw_of(parsed, state, site, slot))


def constant_scale(x: Tensor, state: RunState, *, spec: str, site: int, slot: int, lifetime: str) -> Tensor | None:
    """lp.scale of a weight, kept as `lifetime` says: read again, and computed again only if x has changed. The
    lp.quantize of this `site` and `slot` comes after it, with no write to x between the two.
    """
    if torch.compiler.is_compiling():
        return traced.scale(x, spec)
    parsed = QuantSpec.parse(spec)
    check_transforms(parsed.is_identity, x)
    kept = state.constants.find(x, CastKey(parsed), site, slot, lifetime)
    return compute_scale(x.detach(), parsed) if kept is None else kept.scale_or(lambda: compute_scale(x, parsed))


def learned_scale(x: Tensor, state: RunState, *, spec: str, quantizer: str) -> Tensor:
    """The scale that the quantizer named SITE.OPERAND has, fp32 (), of which one that learns may look at x."""
    scale: Tensor = state.quantizers[quantizer](x)
    return scale


def carrier(x: Tensor, s: Scale, state: RunState, *, spec: str, quantizer: str) -> Tensor:
    """x with the derivatives of the cast of the quantizer named, in x and in its scale s (runtime/quantize/learned)."""
    result: Tensor = state.quantizers[quantizer].carrier(x, s)
    return result


def quantize(
    x: Tensor,
    s: Scale | None,
    state: RunState | None,
    *,
    spec: str,
    site: int,
    slot: int,
    lifetime: str = "",
    quantizer: str = "",
) -> Tensor:
    """Grid values of x / s, x being an lp.rotate where `spec` has a transform. `q * s` is the cast value. Saturates;
    NaN stays NaN. `site` and `slot` key the stochastic bits. With a `lifetime` (x is a weight, s its
    lp.constant_scale) they are kept, and made again only if x has
    changed; or the scale, where it is that of a `quantizer`.
    """
    if torch.compiler.is_compiling():
        return traced.quantize(x, s, state, spec, site, slot)
    parsed = QuantSpec.parse(spec)
    check_transforms(parsed.is_identity, x)
    if lifetime and state is not None:
        kept = _kept(state, x, s, CastKey(parsed, quantizer), site, slot, lifetime)
        if kept is not None:
            return kept.grid_or(lambda: to_grid(x, s, parsed))  # what is kept draws nothing
    return to_grid(x, s, parsed, draw_of(parsed, state, site, slot))


def _kept(
    state: RunState, x: Tensor, s: Tensor | None, key: CastKey, site: int, slot: int, lifetime: str
) -> Kept | None:
    if s is not None and not key.owner:
        return state.constants.find_by_scale(s, site, slot)
    if s is not None and not s.is_cpu:
        return None
    bits = 0 if s is None else int(s.detach().view(torch.int32))  # engines write parameters behind their versions
    return state.constants.find(x, key._replace(version=bits), site, slot, lifetime)


def dequantize(q: Grid, s: Scale | None, *, spec: str) -> Tensor:
    """q * s in fp32."""
    parsed = QuantSpec.parse(spec)
    return q.float() if s is None else q.float() * expand_scale(s, q.shape, parsed)


def stand_in(q: Grid, *, dtype: str) -> Tensor:
    """A tensor of q's shape and of `dtype` in place of the one that q was cast from, where no gradient flows and no
    value is read: one NaN, seen everywhere, so that whatever reads it after all is noticed. Four bytes, not a copy.
    """
    return torch.full((), torch.nan, dtype=getattr(torch, dtype), device=q.device).expand(q.shape)


def gemm(
    lhs: Tensor,
    rhs: Tensor,
    bias: Tensor | None,
    fwd_lhs: Grid,
    fwd_lhs_scale: Scale | None,
    fwd_rhs: Grid,
    fwd_rhs_scale: Scale | None,
    bwd_rhs: Grid | None,
    bwd_rhs_scale: Scale | None,
    grad_lhs: Grid | None,
    grad_lhs_scale: Scale | None,
    state: RunState,
    residual: Tensor | None = None,
    *,
    kind: str,
    spec: str,
    kernels: str,
    site: int,
    geometry: str = "",
    lifetime: str = "",
    activation: str = "",
    name: str = "",
) -> Tensor:
    """One GEMM site, forward and backward, and what follows it. Returns activation(y + residual) in the dtype of lhs;
    see runtime.ops.products for the arithmetic. With a `lifetime`, rhs is a weight whose cast for BWD is kept.

    Without `grad_lhs` there is no GRAD: backward raises. `name`: of the site, in code that is traced.
    """
    if torch.compiler.is_compiling():
        operands = (fwd_lhs, fwd_lhs_scale, fwd_rhs, fwd_rhs_scale, bwd_rhs, bwd_rhs_scale, grad_lhs, grad_lhs_scale)
        how = (kind, spec, kernels, site, geometry)
        return traced.gemm(lhs, rhs, bias, operands, state, *how, residual, activation, name)
    plan = GemmPlan.parse(kind, spec, kernels, site, geometry, lifetime)
    layer = plan.spec
    casts = {
        "fwd_lhs": QTensor(fwd_lhs, fwd_lhs_scale, layer.fwd.lhs),
        "fwd_rhs": QTensor(fwd_rhs, fwd_rhs_scale, layer.fwd.rhs),
        "bwd_rhs": None if bwd_rhs is None else QTensor(bwd_rhs, bwd_rhs_scale, layer.bwd.rhs),
        "grad_lhs": None if grad_lhs is None else QTensor(grad_lhs, grad_lhs_scale, layer.grad.rhs),
    }
    return run_gemm(lhs, rhs, bias, casts, state, plan, residual, activation)


def _parses(attribute: str, parse: Callable[[str], Any]) -> Callable[[dict[str, Any]], bool]:
    def holds(attributes: dict[str, Any]) -> bool:
        try:
            parse(attributes[attribute])
        except Exception:
            return False
        return True

    return holds


def _is_geometry(attributes: dict[str, Any]) -> bool:
    try:
        geometry = parse_geometry(attributes.get("geometry", ""))
    except (ValueError, KeyError, IndexError):
        return False
    if geometry is None:
        return True
    if print_geometry(geometry) != attributes["geometry"]:
        return False
    num_dims, largest = len(geometry.stride), 2**31
    sides = (geometry.stride, geometry.padding, geometry.dilation, geometry.output_padding or (0,) * num_dims)
    return (
        1 <= num_dims <= 3
        and all(len(side) == num_dims for side in sides)
        and all(1 <= size < largest for size in (*geometry.stride, *geometry.dilation, geometry.groups))
        and all(0 <= size < largest for size in (*geometry.padding, *sides[3]))
    )


def _scales_leave_the_sum(attributes: dict[str, Any]) -> bool:
    spec = LayerSpec.parse(attributes["spec"])
    geometry = parse_geometry(attributes.get("geometry", ""))
    kind = contraction_of(attributes["kind"], geometry)
    sides: tuple[Side, Side] = ("lhs", "rhs")
    return not any(why_not_scaled(kind, "", role, side, spec.role(role)) for role in ROLES for side in sides)


def _has_scale_where_spec_has(operands: Operands, attributes: dict[str, Any]) -> bool:
    return (operands["s"] is not None) == QuantSpec.parse(attributes["spec"]).has_scale


def _casts_of(operands: Operands, attributes: dict[str, Any]) -> list[tuple[str, QuantSpec]]:
    """The cast operands of an lp.gemm that are there, with what the spec says of each."""
    spec = LayerSpec.parse(attributes["spec"])
    wanted = (
        ("fwd_lhs", spec.fwd.lhs),
        ("fwd_rhs", spec.fwd.rhs),
        ("bwd_rhs", spec.bwd.rhs),
        ("grad_lhs", spec.grad.rhs),
    )
    return [(name, cast) for name, cast in wanted if operands[name] is not None]


def _are_cast_as_spec_says(operands: Operands, attributes: dict[str, Any]) -> bool:
    for name, cast in _casts_of(operands, attributes):
        given, wanted = operands[name], QuantType.of(cast, VALUE)
        if isinstance(given, QuantType) and (given.format, given.granularity) != (wanted.format, wanted.granularity):
            return False
    return True


def _have_scales_where_spec_has(operands: Operands, attributes: dict[str, Any]) -> bool:
    casts = _casts_of(operands, attributes)
    return all((operands[f"{name}_scale"] is not None) == cast.has_scale for name, cast in casts)


def _is_kept_by_a_state(operands: Operands, attributes: dict[str, Any]) -> bool:
    return not attributes.get("lifetime") or operands["state"] is not None


def _is_same_each_time(attributes: dict[str, Any]) -> bool:
    return not attributes.get("lifetime") or not QuantSpec.parse(attributes["spec"]).is_stochastic


def _does_scale_lie_along(operands: Operands, attributes: dict[str, Any]) -> bool:
    w, v = operands["w"], operands.get("s") or operands.get("t")
    if not isinstance(w, TensorType) or not isinstance(v, TensorType):
        return True
    groups = 1 if attributes["axis"] == 0 else attributes["groups"]
    return len(w.shape) >= 2 and v.shape == (w.shape[attributes["axis"]] * groups,) and w.shape[0] % groups == 0


def _is_residual_like_result(operands: Operands, attributes: dict[str, Any]) -> bool:
    residual, result = operands["residual"], gemm_result(operands, attributes)
    return residual == result or not (isinstance(residual, TensorType) and isinstance(result, TensorType))


_CAST_PARSES = Rule(f"`spec` must be a cast, {CAST_TEXT}", _parses("spec", QuantSpec.parse))

_LIFETIME = Rule(f"`lifetime` must be {' or '.join(LIFETIMES)}", lambda a: a.get("lifetime", LIFETIMES[0]) in LIFETIMES)

_SLOT = Rule(
    "`slot` must be 0 or 1 of FWD's operands, 2 of BWD's rhs or 3 of GRAD's x", lambda a: a["slot"] in range(4)
)

_GEMM_RULES = (
    Rule("`spec` must hold the three GEMMs, `fwd: ...; bwd: ...; grad: ...`", _parses("spec", LayerSpec.parse)),
    Rule(f"`kind` must be one of {', '.join(KINDS)}, conv", lambda a: a["kind"] in {*KINDS, "conv"}),
    Rule(
        "a convolution, and nothing else, has a `geometry`", lambda a: (a["kind"] == "conv") == bool(a.get("geometry"))
    ),
    Rule("`geometry` must say stride, padding, dilation and groups of a convolution", _is_geometry),
    Rule(
        "a scale that varies along the sum must be a power of two, or, per block or channel, in a GEMM with fp32 sums",
        _scales_leave_the_sum,
    ),
    Rule("`kernels` must name one kernel per role, fwd,bwd,grad", lambda a: len(a["kernels"].split(",")) == 3),
    Rule(
        "`kernels` must be empty before they are chosen, else each the name of a kernel",
        lambda a: a["kernels"] == ",," or set(a["kernels"].split(",")) <= {kernel.name for kernel in kernels()},
    ),
    _LIFETIME,
    Rule(
        f"`activation` must be one of {', '.join(ACTIVATIONS)}, or absent",
        lambda a: a.get("activation", "") in ("", *ACTIVATIONS),
    ),
)

_IS_DTYPE = Rule(
    "`dtype` must be a floating-point dtype of torch",
    lambda a: getattr(getattr(torch, a["dtype"], None), "is_floating_point", False),
)
_SAME_EACH_TIME = Rule("a cast that rounds stochastically is not kept", _is_same_each_time)
_KEPT = TypeRule("a cast that is kept must have the `state` that keeps it", _is_kept_by_a_state)
_HAS_SCALE = Rule(
    "`spec` must have a scale that is computed",
    lambda a: (spec := QuantSpec.parse(a["spec"])).has_scale and spec.quantizer is None,
)
_CARRIES = Rule(
    "`spec` must have a quantizer that learns by a gradient", lambda a: not QuantSpec.parse(a["spec"]).observes
)
_TURNS = Rule("`spec` must have a transform", lambda a: QuantSpec.parse(a["spec"]).transform is not None)
_LEARNS = Rule("`spec` must have a quantizer with state", lambda a: QuantSpec.parse(a["spec"]).quantizer is not None)
_NAMES_QUANTIZER = Rule(
    f"`quantizer` must name, as SITE.OPERAND with one of {', '.join(OPERANDS)}, the quantizer of a spec that has one, "
    "and of no other",
    lambda a: (
        bool(a.get("quantizer")) == (QuantSpec.parse(a["spec"]).quantizer is not None)
        and a.get("quantizer", "x").rpartition(".")[2] in (*OPERANDS, "")
    ),
)
_SCALED = TypeRule("`s` must be there where `spec` has a scale, and only there", _has_scale_where_spec_has)

_GEMM_TYPE_RULES = (
    TypeRule("a cast must have the format and granularity that `spec` names", _are_cast_as_spec_says),
    TypeRule("a cast must have a scale where `spec` has one, and only there", _have_scales_where_spec_has),
    TypeRule("a residual must have the shape and dtype of the product", _is_residual_like_result),
)

_FOLD_RULES = (
    Rule("`axis` must be 0 or 1", lambda a: a["axis"] in (0, 1)),
    Rule("`groups` must be at least 1", lambda a: a["groups"] >= 1),
)
_LIES_ALONG = TypeRule("a batch norm must have one number per feature along `axis` of w", _does_scale_lie_along)

OPS: dict[str, OpDef] = {
    op.name: op
    for op in (
        OpDef("lp.rotate", rotate, rotate_result, (_CAST_PARSES, _TURNS, _SLOT)),
        OpDef("lp.scale", scale, scale_result, (_CAST_PARSES, _HAS_SCALE)),
        OpDef(
            "lp.constant_scale",
            constant_scale,
            scale_result,
            (_CAST_PARSES, _HAS_SCALE, _SLOT, _LIFETIME, _SAME_EACH_TIME),
        ),
        OpDef("lp.learned_scale", learned_scale, scale_result, (_CAST_PARSES, _LEARNS, _NAMES_QUANTIZER)),
        OpDef("lp.carrier", carrier, same_as_x, (_CAST_PARSES, _LEARNS, _NAMES_QUANTIZER, _CARRIES)),
        OpDef(
            "lp.quantize",
            quantize,
            quantize_result,
            (_CAST_PARSES, _SLOT, _LIFETIME, _SAME_EACH_TIME, _NAMES_QUANTIZER),
            (_SCALED, _KEPT),
        ),
        OpDef("lp.dequantize", dequantize, dequantize_result, (_CAST_PARSES,), (_SCALED,)),
        OpDef("lp.stand_in", stand_in, stand_in_result, (_IS_DTYPE,)),
        OpDef("lp.gemm", gemm, gemm_result, _GEMM_RULES, _GEMM_TYPE_RULES),
        OpDef("lp.norm_scale", norm_scale, norm_result, (Rule("`eps` must not be negative", lambda a: a["eps"] >= 0),)),
        OpDef("lp.norm_shift", norm_shift, norm_result),
        OpDef("lp.fold_weight", fold_weight, fold_weight_result, _FOLD_RULES, (_LIES_ALONG,)),
        OpDef("lp.fold_bias", fold_bias, fold_bias_result),
        OpDef("lp.fold_input_bias", fold_input_bias, fold_bias_result, _FOLD_RULES, (_LIES_ALONG,)),
    )
}
"""Every op of the dialect by name."""

OP_OF: dict[Callable[..., Any], OpDef] = {op.run: op for op in OPS.values()}
"""The op that a graph node's target runs."""
