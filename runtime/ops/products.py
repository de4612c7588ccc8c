"""Products: each GEMM of a layer, with all that follows it, as one torch op a role.

    lp::fwd    y = activation(out(sum_k q_x[m,k] q_w[n,k] * s_x[m] s_w[n] + bias) + residual)
    lp::bwd    dx = dy . w, in the shape of x
    lp::grad   dw = dy . x, in the shape of w

A scale that varies along the sum is multiplied into the values before it: exactly if it is a power of two, else once
rounded to fp32 (scales per block, and per channel of a convolution's weight in BWD), which only fp32 sums allow.

Eager layers, compiled code and the joint front end call the same three, so their bits are the same. Scales, bias,
residual and relu are one pass over y where that is fp32 (runtime/kernels/cpu/epilogue.py); what is written in place is
written inside of the op, which returns nothing that anyone else has seen. A result is contiguous, that of a convolution
channels-last where an operand is. FLOPs: two for a multiply-add of the geometry, whatever the kernel does.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import _get_current_dispatch_mode

from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cpu.epilogue import finish
from runtime.kernels.registry import AbstractKernel, Epilogue
from runtime.kernels.torch_ops import declare
from runtime.numerics.free_axes import Side
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.scaling import expand_scale
from runtime.numerics.specs import ROLES, GemmSpec, QuantSpec, Role
from runtime.ops.activations import add_and_relu, overwrite_with
from runtime.ops.contractions import ConvGeometry, Multiply
from runtime.ops.plan import GemmPlan
from runtime.ops.slow_path import is_slow, site_named, telling
from runtime.ops.sum_scales import varies_along_sum
from runtime.ops.wide_bias import bf16_with_bias
from runtime.quantize.qtensor import QTensor
from runtime.quantize.storage import storage_dtype
from runtime.state import RunState
from runtime.streams import NO_CLOCK, Turn, stream_of


def multiply(
    role: Role, plan: GemmPlan, a: QTensor, b: QTensor, rest: Tensor | Sequence[int] | None, dtype: torch.dtype,
    turn: RunState | Turn | None, residual: Tensor | None = None, activation: str = "",
) -> Tensor:  # fmt: skip
    """One role as one op. rest: FWD's bias, else the shape of the result, which is in `dtype`; turn: what keys the
    random bits of its sums.
    """
    if is_slow(plan.kernel(role)):
        with site_named(plan.name):
            return _multiplied(role, plan, a, b, rest, dtype, turn, residual, activation)
    return _multiplied(role, plan, a, b, rest, dtype, turn, residual, activation)


def _multiplied(
    role: Role, plan: GemmPlan, a: QTensor, b: QTensor, rest: Tensor | Sequence[int] | None, dtype: torch.dtype,
    turn: RunState | Turn | None, residual: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    plan, clock = _drawing(plan, role, turn)
    call = (*a.pair, *b.pair, rest, plan.text, clock, dtype)
    if role != "fwd":
        gradient: Tensor = _CALLS[role](*call)
        return gradient
    y: Tensor = _CALLS[role](*call, residual, activation)
    return y


def multiply_unrecorded(
    plan: GemmPlan, a: QTensor, b: QTensor, bias: Tensor | None, dtype: torch.dtype, turn: RunState | Turn | None
) -> Tensor:
    """FWD where no gradient flows: what lp::fwd computes, without the op unless someone watches operations."""
    is_watched = _get_current_dispatch_mode() is not None or type(a.grid) is not Tensor or type(b.grid) is not Tensor
    if is_watched or is_slow(plan.kernel("fwd")):
        return multiply("fwd", plan, a, b, bias, dtype, turn)
    plan, clock = _drawing(plan, "fwd", turn)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(plan, a, b, bias, clock, dtype)


def _drawing(plan: GemmPlan, role: Role, turn: RunState | Turn | None) -> tuple[GemmPlan, tuple[int, ...]]:
    """The plan of this call of its site, and the clock if its sums draw: what compiled code reads is guarded."""
    if turn is None or role not in plan.stochastic_sums:
        return plan, NO_CLOCK
    return plan.at(turn.site) if isinstance(turn, Turn) else plan, turn.clock


def multiply_traced(
    role: Role, plan: GemmPlan, a: QTensor, b: QTensor, rest: Tensor | Sequence[int] | None, dtype: torch.dtype,
    turn: RunState | Turn | None,
) -> Tensor:  # fmt: skip
    """One role as compiled code has it: the opaque product, and its scales in operations that fuse with what follows.
    rest: FWD's bias, else the shape of the result, which is in `dtype`.
    """
    if not has_free_scales(plan, role, a, b):
        return multiply(role, plan, a, b, rest, dtype, turn)
    bare = rest if role != "fwd" else None
    left, right = replace(a, scale=None), replace(b, scale=None)
    y = multiply(role, plan, left, right, bare, torch.float32, turn)
    bias = rest if isinstance(rest, Tensor) else None
    return with_scales(role, plan, y, a.scale, b.scale, bias).to(dtype)


def own(y: Tensor) -> Tensor:
    """y, not as a view of the matrix that it was computed as, which nothing else holds: a caller may write into it."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    owned: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return owned


def has_free_scales(plan: GemmPlan, role: Role, a: QTensor, b: QTensor) -> bool:
    """Whether all that is left to do after the product of a linear layer is to multiply by scales and add the bias."""
    if plan.kind not in ("linear", "linear_kn") or plan.spec.role(role).out != "fp32" or a.scale is b.scale is None:
        return False
    sides: tuple[tuple[Side, QTensor], ...] = (("lhs", a), ("rhs", b))
    return not any(varies_along_sum(plan.contraction, role, side, each.spec) for side, each in sides)


def with_scales(
    role: Role, plan: GemmPlan, y: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A product without scales, times those of its rows and of its columns in the order of eager code, plus bias."""
    rows, columns = a_scale, b_scale
    if role == "grad" and plan.contraction.grad_rows == "rhs":
        rows, columns = b_scale, a_scale
    if rows is not None:
        y = y * (rows if rows.dim() == 0 else rows.reshape(*y.shape[:-1], 1))
    if columns is not None:
        y = y * (columns if columns.dim() == 0 else columns.reshape(-1))
    return y if bias is None else y + bias


def multiply_fwd(
    plan: GemmPlan,
    x: QTensor,
    w: QTensor,
    bias: Tensor | None,
    key: RandomKey,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """FWD with what follows it, in the dtype that the kernel gives. Scales and bias come before `out`, which rounds
    once; residual and relu after it.
    """
    spec, kernel, kind = plan.spec.fwd, plan.kernel("fwd"), plan.contraction_of("fwd")
    x, w = _with_scales_in_sum(plan, "fwd", x, w)
    lhs, rhs = kernel.load(x.grid), kernel.load(w.grid)
    is_unscaled = x.scale is None and w.scale is None
    if kernel.has_native and spec.out == kernel.out and is_unscaled:
        if bias is None or kernel.out != "bf16":
            y = kind.native(lhs, rhs, bias if bias is None else kernel.load(bias))
        else:
            y = bf16_with_bias(kind, lhs, rhs, bias)
        return add_and_relu(y, residual, relu)
    after = (bias, residual, relu) if spec.out == "fp32" else (bias, None, False)
    if plan.geometry is not None:
        y = kind.fwd(lhs, rhs, _product(plan, "fwd", x, w, key))
        if y.is_contiguous() and all(s is None or s.dim() == 0 for s in (x.scale, w.scale)):
            y = _finish_conv(plan.geometry, y, x.scale, w.scale, *after)
        else:
            y = _scaled(y, x.scale, _per_channel(w.scale, plan.geometry))
            channels = (-1, *(1,) * len(plan.geometry.stride))
            y = add_and_relu(y if bias is None else y + bias.view(channels), *after[1:])
    elif plan.kind != "matmul":
        y = kind.fwd(lhs, rhs, _product(plan, "fwd", x, w, key, after=after))
    else:
        y = kind.fwd(lhs, rhs, _product(plan, "fwd", x, w, key))
        y = add_and_relu(y if bias is None else y + bias, *after[1:])
    return y if spec.out == "fp32" else add_and_relu(_round_out(y, spec, kernel), residual, relu)


def _finish_conv(
    geometry: ConvGeometry,
    y: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """y (N, C, ...), or (C, ...), times two numbers plus a bias per channel: rows are the channels of each sample."""
    num_channels = y.shape[-1 - len(geometry.stride)]
    rows = y.view(-1, y.shape[-len(geometry.stride) :].numel())
    per_row = None if bias is None else bias.repeat(rows.shape[0] // max(num_channels, 1)).view(-1, 1)
    summand = None if residual is None else residual.reshape(rows.shape)
    return finish(rows, s, t, per_row, summand, relu).view(y.shape)


def multiply_bwd(plan: GemmPlan, dy: QTensor, w: QTensor, lhs_shape: torch.Size, key: RandomKey) -> Tensor:
    spec, kernel = plan.spec.bwd, plan.kernel("bwd")
    dy, w = _with_scales_in_sum(plan, "bwd", dy, w)
    multiply = _product(plan, "bwd", dy, w, key)
    dx = plan.contraction_of("bwd").bwd(kernel.load(dy.grid), kernel.load(w.grid), lhs_shape, multiply)
    return _round_out(dx if plan.geometry is None else _scaled(dx, dy.scale, w.scale), spec, kernel)


def multiply_grad(plan: GemmPlan, dy: QTensor, x: QTensor, rhs_shape: torch.Size, key: RandomKey) -> Tensor:
    spec, kernel = plan.spec.grad, plan.kernel("grad")
    dy, x = _with_scales_in_sum(plan, "grad", dy, x)
    multiply = _product(plan, "grad", dy, x, key, is_swapped=plan.contraction.grad_rows == "rhs")
    dw = plan.contraction_of("grad").grad(kernel.load(dy.grid), kernel.load(x.grid), rhs_shape, multiply)
    return _round_out(dw if plan.geometry is None else _scaled(dw, dy.scale, x.scale), spec, kernel)


def _round_out(y: Tensor, spec: GemmSpec, kernel: AbstractKernel) -> Tensor:
    """The last step. A kernel that rounds to `out` itself is chosen only where nothing comes after its product."""
    if spec.out in ("fp32", kernel.out):
        return y
    return fast_to_grid(y.float(), QuantSpec.parse(spec.out), None, dtype=storage_dtype(spec.out))


def _per_channel(scale: Tensor | None, geometry: ConvGeometry) -> Tensor | None:
    """A weight's scale, (C, 1, ..., 1) or (), made to broadcast against the channels of (N, C, ...) and of (C, ...)."""
    return scale if scale is None or scale.dim() == 0 else scale.reshape(-1, *(1,) * len(geometry.stride))


def _scaled(y: Tensor, *scales: Tensor | None) -> Tensor:
    for scale in scales:
        y = y if scale is None else y * scale
    return y


def _product(
    plan: GemmPlan,
    role: Role,
    lhs: QTensor,
    rhs: QTensor,
    key: RandomKey,
    is_swapped: bool = False,
    after: tuple[Tensor | None, Tensor | None, bool] = (None, None, False),
) -> Multiply:
    """The kernel's product, times the scales of its rows and columns; `is_swapped` if rhs gives the rows. `after`:
    bias, residual and whether a relu comes.
    """
    spec, kernel = plan.spec.role(role), plan.kernel(role)
    rows, columns = (rhs, lhs) if is_swapped else (lhs, rhs)
    if is_swapped:
        spec = spec.swapped
    if plan.geometry is not None:  # the result of a conv is scaled
        multiply: Multiply = partial(kernel.multiply, spec=spec, key=key)
    else:
        batched = plan.kind == "matmul"
        epilogue = Epilogue(_along(rows, "row", batched), _along(columns, "column", batched), *after)
        multiply = partial(kernel.run, epilogue=epilogue, spec=spec, key=key)
    return telling(multiply, plan.site, plan.kind, role, plan.spec.role(role)) if is_slow(kernel) else multiply


def _along(operand: QTensor, axis: str, batched: bool) -> Tensor | None:
    """The operand's free scale, laid along the rows or the columns of a product."""
    scale = operand.scale
    if scale is None or scale.dim() == 0:
        return scale
    if not batched:
        return scale.reshape((-1, 1) if axis == "row" else (1, -1))
    assert operand.spec.scale is not None
    return scale if operand.spec.scale.granularity == axis else scale.transpose(-1, -2)


def _with_scales_in_sum(plan: GemmPlan, role: Role, lhs: QTensor, rhs: QTensor) -> tuple[QTensor, QTensor]:
    """Multiply into the grid values any scale that varies along the sum, as the head of this file says."""
    sides: tuple[tuple[Side, QTensor], ...] = (("lhs", lhs), ("rhs", rhs))
    scaled = []
    for side, operand in sides:
        if operand.scale is not None and varies_along_sum(plan.contraction, role, side, operand.spec):
            value = operand.grid.float() * expand_scale(operand.scale, operand.grid.shape, operand.spec)
            operand = replace(operand, grid=value, scale=None)
        scaled.append(operand)
    return scaled[0], scaled[1]


def _key(plan: GemmPlan, role: Role, clock: Sequence[int]) -> RandomKey:
    if role not in plan.stochastic_sums:
        return NO_KEY
    return RandomKey(*stream_of(clock, plan.site, _ACCUMULATE[role]))


def _operands(
    role: Role, plan: GemmPlan, a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None
) -> tuple[QTensor, QTensor]:
    numbers = plan.spec.role(role)
    return QTensor(a, a_scale, numbers.lhs), QTensor(b, b_scale, numbers.rhs)


def _fwd(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, plan: str,
    clock: Sequence[int], dtype: torch.dtype, residual: Tensor | None = None, activation: str = "",
) -> Tensor:  # fmt: skip
    parsed = GemmPlan.read(plan)
    operands = _operands("fwd", parsed, x, x_scale, w, w_scale)
    return _forward(parsed, *operands, bias, clock, dtype, residual, activation)


def _forward(
    plan: GemmPlan, a: QTensor, b: QTensor, bias: Tensor | None, clock: Sequence[int], dtype: torch.dtype,
    residual: Tensor | None = None, activation: str = "",
) -> Tensor:  # fmt: skip
    key, relu = _key(plan, "fwd", clock), activation == "relu"
    if dtype == torch.float32 and plan.spec.fwd.out == "fp32":
        y = multiply_fwd(plan, a, b, bias, key, residual, relu)
    else:
        y = add_and_relu(multiply_fwd(plan, a, b, bias, key).to(dtype), residual, relu)
    return laid_out(overwrite_with(y, activation), layout_of(plan, a.grid, b.grid))


def _fwd_shape(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, plan: str,
    clock: Sequence[int], dtype: torch.dtype, residual: Tensor | None = None, activation: str = "",
) -> Tensor:  # fmt: skip
    parsed = GemmPlan.read(plan)
    y = parsed.contraction.native(x.to(dtype), w.to(dtype), None)
    return _new(x, y.shape, dtype, layout_of(parsed, x, w))


def _bwd(
    dy: Tensor, dy_scale: Tensor | None, w: Tensor, w_scale: Tensor | None, shape: Sequence[int], plan: str,
    clock: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    parsed = GemmPlan.read(plan)
    operands = _operands("bwd", parsed, dy, dy_scale, w, w_scale)
    dx = multiply_bwd(parsed, *operands, torch.Size(shape), _key(parsed, "bwd", clock)).to(dtype)
    return laid_out(dx, layout_of(parsed, dy, w))


def _grad(
    dy: Tensor, dy_scale: Tensor | None, x: Tensor, x_scale: Tensor | None, shape: Sequence[int], plan: str,
    clock: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    parsed = GemmPlan.read(plan)
    operands = _operands("grad", parsed, dy, dy_scale, x, x_scale)
    dw = multiply_grad(parsed, *operands, torch.Size(shape), _key(parsed, "grad", clock)).to(dtype)
    return laid_out(dw, layout_of(parsed, dy, x))


def _shape_of_gradient(
    dy: Tensor, dy_scale: Tensor | None, other: Tensor, other_scale: Tensor | None, shape: Sequence[int], plan: str,
    clock: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _new(dy, shape, dtype, layout_of(GemmPlan.read(plan), dy, other))


def layout_of(plan: GemmPlan, a: Tensor, b: Tensor) -> torch.memory_format:
    """Channels-last where torch's convolution would give that: an operand is, and a channel dim is there."""
    if plan.geometry is not None and a.dim() == b.dim() == 2 + len(plan.geometry.stride) >= 4:
        wanted = torch.channels_last if a.dim() == 4 else torch.channels_last_3d
        if wanted in (suggest_memory_format(a), suggest_memory_format(b)):
            return wanted
    return torch.contiguous_format


def laid_out(y: Tensor, layout: torch.memory_format) -> Tensor:
    """y in this layout, and as no view."""
    return own(y.contiguous(memory_format=layout))


def _new(like: Tensor, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=layout)


def _fwd_flops(
    x: Sequence[int], _x: Any, w: Any, _w: Any, _b: Any, plan: str, *_: Any, out_shape: Any, **__: Any
) -> int:
    return _flops(plan, x, w, out_shape)


def _bwd_flops(dy: Any, _dy: Any, w: Any, _w: Any, shape: Any, plan: str, *_: Any, out_shape: Any) -> int:
    return _flops(plan, shape, w, dy)


def _grad_flops(dy: Any, _dy: Any, x: Any, _x: Any, shape: Any, plan: str, *_: Any, out_shape: Any) -> int:
    return _flops(plan, x, shape, dy)


def _flops(plan: str, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> int:
    """Of one role, 2 a multiply-add, from shapes: all three have the same. A convolution has one of w at every position
    of y, a transposed one at every position of x.
    """
    conv = GemmPlan.read(plan).geometry
    if conv is None:
        return 2 * math.prod(y) * x[-1]
    positions, num_dims = x if conv.is_transposed else y, len(conv.stride)
    batch = positions[0] if len(positions) == num_dims + 2 else 1
    return 2 * batch * math.prod(positions[-num_dims:]) * math.prod(w)


_ACCUMULATE: dict[Role, int] = {"fwd": 7, "bwd": 8, "grad": 9}
"""Slots of the random streams; those of casts are below."""
_ROLE = "str plan, SymInt[] clock, ScalarType dtype"
declare(
    f"fwd(Tensor x, Tensor? x_scale, Tensor w, Tensor? w_scale, Tensor? bias, {_ROLE}, Tensor? residual=None, "
    'str activation="") -> Tensor',
    _fwd, fake=_fwd_shape, flops=_fwd_flops,
)  # fmt: skip
declare(
    f"bwd(Tensor dy, Tensor? dy_scale, Tensor w, Tensor? w_scale, SymInt[] shape, {_ROLE}) -> Tensor",
    _bwd, fake=_shape_of_gradient, flops=_bwd_flops,
)  # fmt: skip
declare(
    f"grad(Tensor dy, Tensor? dy_scale, Tensor x, Tensor? x_scale, SymInt[] shape, {_ROLE}) -> Tensor",
    _grad, fake=_shape_of_gradient, flops=_grad_flops,
)  # fmt: skip
_CALLS = {role: getattr(torch.ops.lp, role).default for role in ROLES}
