"""Small products: a linear layer of matrices so small that Python between the kernels would be most of its time.

    y = x.w + bias     one call of C++ that makes casts and product (runtime/kernels/cpu/small.py), with the bits of the
                       casts and ops that a large layer runs
    dx, dw             one call each; x and w are saved as torch's own layer saves them, and cast again: as there, one
                       that is written before backward raises, where a large layer has its cast of the old values

Casts are not shared between layers, nor kept: to look one up takes longer than to make it. What watches operations (a
dispatch mode, a tracer, the profiler) finds the ops of products.py instead. All but plain fp32 tensors of the CPU,
autocast, casts that are stochastic or have state, and kernels without a C function take the path of large layers.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from runtime.kernels.cpu.small import Memory, SmallCast, SmallProduct, small_cast, small_product
from runtime.kernels.torch_ops import is_transformed, is_watched
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec, Role
from runtime.ops import layer
from runtime.ops.plan import GemmPlan
from runtime.ops.sum_scales import varies_along_sum
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

_TRANSPOSES: dict[tuple[str, Role], tuple[bool, bool]] = {
    ("linear", "bwd"): (False, False),
    ("linear", "grad"): (True, False),
    ("linear_kn", "bwd"): (False, True),
    ("linear_kn", "grad"): (False, True),
}
"""Whether dy, and the other operand, is transposed in contractions.py."""


class _ThreadMemory(threading.local):
    """What casts are made in that nothing keeps."""

    def __init__(self) -> None:
        self.of_left: Memory = {}
        self.of_right: Memory = {}


_MEMORY = _ThreadMemory()


@dataclass(frozen=True)
class _InFp32:
    """BWD or GRAD as torch multiplies it in fp32, of casts that C++ makes; None: the operand is taken as it is. What
    products.py computes, with nothing to decide between the steps.
    """

    left: SmallCast | None
    right: SmallCast | None
    transposes: tuple[bool, bool]
    is_swapped: bool
    """Whether the right operand gives the rows."""

    def __call__(self, dy: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
        """The product in `shape`; dy and other as they lie, `other` contiguous."""
        a, rows = (dy, None) if self.left is None else self.left(dy.contiguous(), _MEMORY.of_left)
        b, columns = (other, None) if self.right is None else self.right(other, _MEMORY.of_right)
        a = a if a.dim() == 2 else a.reshape(-1, a.shape[-1])
        b = b if b.dim() == 2 else b.reshape(-1, b.shape[-1])
        a, b = a.t() if self.transposes[0] else a, b.t() if self.transposes[1] else b
        if self.is_swapped:
            a, rows, b, columns = b, columns, a, rows
        y = torch.mm(a, b)
        if rows is not None:
            y.mul_(rows.view(-1, 1) if rows.dim() else rows)
        if columns is not None:
            y.mul_(columns.view(-1) if columns.dim() else columns)
        return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape)


class SmallLayer:
    """The three products of a layer, each None where it has no small form, and what multiplies in fp32 instead."""

    def __init__(self, plan: GemmPlan) -> None:
        self.key = plan.kind, plan.spec, plan.kernels
        self.products = {role: _small(plan, role) for role in ROLES}
        self.in_fp32 = {role: _in_fp32(plan, role) for role in ROLES}
        self.is_swapped = plan.contraction.grad_rows == "rhs"

    def __reduce__(self) -> tuple[Any, ...]:
        return small_layer, self.key

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None, plan: GemmPlan, state: RunState) -> Tensor | None:
        """x.w + bias in fp32, differentiable in all three; None where the path of a large product is to run it. That is
        decided by the operands alone, so that a checkpoint saves the same tensors whoever watches.
        """
        if not (_is_served(x) and _is_served(w) and (bias is None or _is_served(bias))) or w.dim() != 2:
            return None
        num_columns, num_summed = w.shape if plan.kind == "linear" else w.shape[::-1]
        if x.shape[-1:] != (num_summed,) or (bias is not None and bias.shape != (num_columns,)):
            return None
        if x.numel() // num_summed * num_columns > LARGEST or torch.is_autocast_enabled("cpu") or is_transformed():
            return None
        operands = (x, w) if bias is None else (x, w, bias)
        needs_grad = torch.is_grad_enabled() and any(each.requires_grad for each in operands)
        if needs_grad and (plan.spec.keep != "grid" or any(each.is_inference() for each in operands)):
            return None  # what it saves is x itself
        y = None if is_watched() else self._multiply(x, w, bias, num_columns)
        if not needs_grad:
            if y is not None:
                layer.note_call(state, plan, "fwd")
            return y
        result: Tensor = _SmallGemm.apply(x, w, bias, [y], self, plan, state)
        return result

    def _multiply(self, x: Tensor, w: Tensor, bias: Tensor | None, num_columns: int) -> Tensor | None:
        """None where a value has no place in int8."""
        fwd, y = self.products["fwd"], x.new_empty((*x.shape[:-1], num_columns))
        assert fwd is not None
        return None if fwd(x, w, bias, y) and fwd.is_exact_only else y


@lru_cache(maxsize=4096)
def small_layer(kind: str, spec: LayerSpec, kernels: tuple[str, str, str]) -> SmallLayer | None:
    """The small form of a layer; None where FWD has none."""
    if (kind, "fwd") not in _SUMMED_ALONG_ROWS or spec.is_stochastic or spec.observes:
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


def _in_fp32(plan: GemmPlan, role: Role) -> _InFp32 | None:
    """BWD or GRAD, if torch multiplies it in fp32 and its scales leave the sum."""
    spec, kernel, kind = plan.spec.role(role), plan.kernel(role), plan.contraction
    if role == "fwd" or kernel.name != "fp32" or spec.out != "fp32":
        return None
    sides: tuple[tuple[Side, QuantSpec], ...] = (("lhs", spec.lhs), ("rhs", spec.rhs))
    if any(varies_along_sum(kind, role, side, each) for side, each in sides):
        return None
    left, right = (None if each.is_identity else small_cast(each) for _, each in sides)
    if (left is None and not spec.lhs.is_identity) or (right is None and not spec.rhs.is_identity):
        return None
    is_swapped = role == "grad" and kind.grad_rows == "rhs"
    return _InFp32(left, right, _TRANSPOSES[plan.kind, role], is_swapped)


def _is_served(x: Tensor) -> bool:
    """Whether C++ may read it as it lies: its keys tell plain tensors from lazily negated, zero and batched ones."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.dtype is torch.float32
        and torch._C._dispatch_keys(x).raw_repr() in _PLAIN
        and x.is_contiguous()
        and 0 < x.numel() <= LARGEST
    )


def _keys_of(x: Tensor) -> int:
    return int(torch._C._dispatch_keys(x).raw_repr())


with torch.inference_mode():
    _PLAIN = {_keys_of(torch.empty(1, device="cpu"))}
_PLAIN.add(_keys_of(torch.empty(1, device="cpu")))
"""The dispatch keys of tensors on the CPU that have memory and nothing else, inference tensors too."""


class _SmallGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, made: list[Tensor | None],
        small: SmallLayer, plan: GemmPlan, state: RunState,
    ) -> Tensor:  # fmt: skip
        layer.note_call(state, plan, "fwd")
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.small, ctx.plan, ctx.state = small, plan, state
        ctx.shapes = x.shape, w.shape
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        return layer.forward_of(plan, x, w, bias) if made[0] is None else made[0]

    @staticmethod
    @layer.differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        x_shape, w_shape = ctx.shapes
        dx = dw = db = None
        matrix = None if is_watched() or is_transformed() else dy.contiguous()
        matrix = matrix if matrix is not None and _is_served(matrix) else None
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        if needs_x:
            dx = _gradient("bwd", ctx, dy, matrix, w, w_shape, x_shape)
        if needs_w:
            dw = _gradient("grad", ctx, dy, matrix, x, x_shape, w_shape)
        if needs_bias:  # one a column
            db = ctx.plan.contraction.bias_grad(dy)
        return dx, dw, db, *(None,) * 4


def _gradient(
    role: Role, ctx: Any, dy: Tensor, matrix: Tensor | None, other: Tensor, saved: torch.Size, shape: torch.Size
) -> Tensor:
    """BWD or GRAD, in `shape`; as a large layer runs it where it has no small form, where C++ may not read dy (its
    contiguous `matrix` is None), or where what comes back is not what was saved, of the shape `saved`.
    """
    plan, state, product, in_fp32 = ctx.plan, ctx.state, ctx.small.products[role], ctx.small.in_fp32[role]
    if matrix is None or other.shape != saved or not _is_served(other):
        return layer.gradient_of(role, plan, state, dy, other, shape)
    if product is not None:
        is_swapped = role == "grad" and ctx.small.is_swapped
        out = matrix.new_empty(shape)
        left, right = (other, matrix) if is_swapped else (matrix, other)
        said = product(left, right, None, out)
        if not (said and product.is_exact_only):
            layer.note_backward(state, plan, role)
            if state.watch_overflow:
                state.note_overflow(bool(said & (2 if is_swapped else 1)), plan.name or "", role)
            return out
    elif in_fp32 is not None and not state.watch_overflow:
        layer.note_backward(state, plan, role)
        return in_fp32(dy, other, shape)
    return layer.gradient_of(role, plan, state, dy, other, shape)
