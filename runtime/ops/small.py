"""Small products: a linear layer of matrices so small that Python between the kernels would be most of its time.

    y = x.w + bias     one call of C++ that makes casts and product (runtime/kernels/cpu/small.py), with the bits of the
                       casts and ops that a large layer runs
    dx, dw             one call each; x and w are saved as torch's own layer saves them, and cast again

Casts are not shared between layers, nor kept: to look one up takes longer than to make it. What watches operations (a
dispatch mode, a transform, autocast, the profiler) finds the ops of products.py instead, as do all but plain fp32
tensors of the CPU, casts that are stochastic or have state, and kernels without a C function.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from runtime.kernels.cpu.small import SmallCast, SmallProduct, small_cast, small_product
from runtime.kernels.torch_ops import is_watched
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec, Role
from runtime.ops import layer
from runtime.ops.plan import GemmPlan
from runtime.ops.products import own, with_scales
from runtime.ops.sum_scales import varies_along_sum
from runtime.quantize.qtensor import QTensor
from runtime.state import RunState

LARGEST = 1 << 14
"""Elements of a matrix above which a cast is worth looking up, and a product its threads."""

_SUMMED_ALONG_ROWS: dict[tuple[str, Role], tuple[bool, bool]] = {
    ("linear", "fwd"): (False, False),
    ("linear", "bwd"): (False, True),
    ("linear", "grad"): (True, True),
    ("linear_kn", "fwd"): (False, True),
    ("linear_kn", "bwd"): (False, False),
    ("linear_kn", "grad"): (True, True),
}
"""Whether the sum of a role runs down the rows of its operands' matrices; that which gives the result's rows first."""


_Cast = tuple[QuantSpec, SmallCast | None]
"""None: the operand is taken as it is."""


class SmallLayer:
    """The three products of a layer, each None where it has no small form, and the casts of those that have none."""

    def __init__(self, plan: GemmPlan) -> None:
        self.key = plan.kind, plan.spec, plan.kernels
        self.products = {role: _small(plan, role) for role in ROLES}
        self.casts = {role: _casts(plan, role) for role in ROLES}
        self.is_swapped = plan.contraction.grad_rows == "rhs"

    def __reduce__(self) -> tuple[Any, ...]:
        return small_layer, self.key

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None, plan: GemmPlan, state: RunState) -> Tensor | None:
        """x.w + bias in fp32, differentiable in all three; None where the path of a large product is to run it."""
        if not (_is_served(x) and _is_served(w) and (bias is None or _is_served(bias))) or _is_changed():
            return None
        if w.dim() != 2:
            return None
        num_columns, num_summed = w.shape if plan.kind == "linear" else w.shape[::-1]
        leading = x.shape[:-1]
        if x.shape[-1:] != (num_summed,) or (bias is not None and bias.shape != (num_columns,)):
            return None
        y = x.new_empty((*leading, num_columns))
        if y.numel() > LARGEST:
            return None
        fwd = self.products["fwd"]
        assert fwd is not None
        if fwd(x, w, bias, y) and fwd.is_exact_only:
            return None
        if not torch.is_grad_enabled() or not (
            x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
        ):
            layer.note_call(state, plan, "fwd")
            return y
        result: Tensor = _SmallGemm.apply(x, w, bias, [y], self, plan, state)
        return result


@lru_cache(maxsize=4096)
def small_layer(kind: str, spec: LayerSpec, kernels: tuple[str, str, str]) -> SmallLayer | None:
    """The small form of a layer; None where FWD has none."""
    if (kind, "fwd") not in _SUMMED_ALONG_ROWS or spec.is_stochastic:
        return None
    small = SmallLayer(GemmPlan(kind, spec, kernels, site=0))
    return None if small.products["fwd"] is None else small


def _small(plan: GemmPlan, role: Role) -> SmallProduct | None:
    spec, kernel = plan.spec.role(role), plan.kernel(role)
    function = kernel.c_function()
    if function is None or kernel.dtype is None or spec.out != "fp32":
        return None
    left, right = spec.lhs, spec.rhs
    if role == "grad" and plan.contraction.grad_rows == "rhs":
        left, right = right, left
    return small_product(left, right, kernel.dtype, function, _SUMMED_ALONG_ROWS[plan.kind, role])


def _casts(plan: GemmPlan, role: Role) -> tuple[_Cast, _Cast] | None:
    """Of the operands of BWD or GRAD, if torch multiplies them in fp32 and their scales leave the sum."""
    spec, kernel, kind = plan.spec.role(role), plan.kernel(role), plan.contraction
    if role == "fwd" or kernel.name != "fp32" or spec.out != "fp32":
        return None
    sides: tuple[tuple[Side, QuantSpec], ...] = (("lhs", spec.lhs), ("rhs", spec.rhs))
    if any(varies_along_sum(kind, role, side, each) for side, each in sides):
        return None
    casts = [(each, None if each.is_identity else small_cast(each)) for _, each in sides]
    return None if any(made is None and not each.is_identity for each, made in casts) else (casts[0], casts[1])


def _cast(x: Tensor, how: _Cast) -> QTensor:
    spec, make = how
    return QTensor(*((x, None) if make is None else make(x)), spec)


def _multiply_in_fp32(role: Role, plan: GemmPlan, dy: QTensor, other: QTensor, shape: torch.Size) -> Tensor:
    of_role = plan.contraction.bwd if role == "bwd" else plan.contraction.grad
    y = of_role(dy.grid, other.grid, shape, torch.matmul)
    return own(with_scales(role, plan, y, dy.scale, other.scale, None))


def _is_served(x: Tensor) -> bool:
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and 0 < x.numel() <= LARGEST
    )


def _is_changed() -> bool:
    """Whether something sees operations, or changes what they compute."""
    return is_watched() or torch.is_autocast_enabled("cpu")


class _SmallGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, made: list[Tensor],
        small: SmallLayer, plan: GemmPlan, state: RunState,
    ) -> Tensor:  # fmt: skip
        layer.note_call(state, plan, "fwd")
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.small, ctx.plan, ctx.state, ctx.shapes = (
            small,
            plan,
            state,
            (x.shape, w.shape, None if bias is None else bias.shape),
        )
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        return made[0]

    @staticmethod
    @layer.differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        x_shape, w_shape, bias_shape = ctx.shapes
        dx = dw = db = None
        is_served = type(dy) is Tensor and dy.dtype is torch.float32 and dy.is_cpu and not _is_changed()
        dy = dy.contiguous() if is_served else dy
        if ctx.needs_input_grad[0]:
            dx = _gradient("bwd", ctx, dy, w, x_shape, is_served)
        if ctx.needs_input_grad[1]:
            dw = _gradient("grad", ctx, dy, x, w_shape, is_served)
        if ctx.needs_input_grad[2]:
            db = ctx.plan.contraction.bias_grad(dy).sum_to_size(bias_shape)
        return dx, dw, db, *(None,) * 4


def _gradient(role: Role, ctx: Any, dy: Tensor, other: Tensor, shape: torch.Size, is_served: bool) -> Tensor:
    """BWD or GRAD; where it has no small form as a large layer runs it."""
    plan, state, product = ctx.plan, ctx.state, ctx.small.products[role]
    if product is not None and is_served:
        is_swapped = role == "grad" and ctx.small.is_swapped
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        left, right = (other, dy) if is_swapped else (dy, other)
        said = product(left, right, None, out)
        if not (said and product.is_exact_only):
            layer.note_backward(state, plan, role)
            if state.watch_overflow:
                state.note_overflow(bool(said & (2 if is_swapped else 1)))
            return out
    casts = ctx.small.casts[role]
    if casts is not None and is_served and not state.watch_overflow:
        layer.note_backward(state, plan, role)
        return _multiply_in_fp32(role, plan, _cast(dy, casts[0]), _cast(other, casts[1]), shape)
    return layer.gradient_of(role, plan, state, dy, other, shape)
