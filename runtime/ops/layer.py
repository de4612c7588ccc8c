"""The three GEMMs of a layer as one autograd function: FWD y = x.w, BWD dx = dy.w, GRAD dw = dy.x.

Straight-through: the casts of x and w have derivative one, so x and w enter twice, once as the carrier of the gradient
and once as the values that are multiplied. Backward keeps the cast operands that BWD and GRAD need and not the
originals; BWD's cast of a weight is made in backward from the parameter itself, or found there among the casts that
runtime/quantize/kept_casts.py keeps, so that nothing outlives a partitioned or resharded weight.

    y = out(sum_k q_x[m,k] q_w[n,k] * s_x[m] s_w[n]) + bias        the bias is added in the output's dtype, after `out`

A scale that varies along the sum is multiplied into the values before it: exactly if it is a power of two, else once
rounded to fp32 (scales per block, and per channel of a convolution's weight in BWD), which only fp32 sums allow.

    z = activation(y + residual)        what follows a product may be a part of it, with the bits of separate ops

Scales, bias, residual and relu are one pass over y where that is fp32 (runtime/kernels/cpu/epilogue.py).

dy is cast here, once when BWD and GRAD cast it alike. A gradient operand beyond its format's maximum saturates, and
sets `state.overflow` when `state.watch_overflow` asks for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime.errors import NotSupported
from runtime.kernels.cast.grid import fast_to_grid, fast_to_grid_checked
from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.cpu import gemm as cpu_gemm
from runtime.kernels.cpu.epilogue import finish
from runtime.kernels.dispatch import EMULATED, multiplier
from runtime.kernels.torch_native import DTYPES
from runtime.numerics.block_formats import grid_format
from runtime.numerics.formats import embeds
from runtime.numerics.free_axes import Side
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.scaling import expand_scale
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec, Role
from runtime.ops import opaque
from runtime.ops.activations import activation_grad, add_and_relu, finish_with, followed_by
from runtime.ops.contractions import (
    AbstractContraction,
    Conv,
    ConvGeometry,
    Linear,
    LinearKN,
    Matmul,
    Multiply,
)
from runtime.ops.im2col import unfolded
from runtime.ops.sum_scales import varies_along_sum
from runtime.state import RunState

KINDS: dict[str, AbstractContraction] = {"linear": Linear(), "linear_kn": LinearKN(), "matmul": Matmul()}
METHODS = (
    *("as_is", "fp32", "bf16", "int8"),
    *("cpu_bf16", "cpu_int8"),
    *("cuda_fp8", "cuda_bf16", "cuda_fp16", "cuda_int8"),
    *EMULATED,
)
"""What `methods` may name, of the backends of runtime/kernels/dispatch.py."""
_STORAGE = {"fp16": torch.float16, "int8": torch.int8}

_DY_BWD, _DY_GRAD, _WEIGHT_BWD = (
    4,
    5,
    6,
)  # operand slots of the random streams; 0 to 3 are the casts of the forward graph
_ACCUMULATE: dict[Role, int] = {"fwd": 7, "bwd": 8, "grad": 9}


@dataclass(frozen=True)
class GemmPlan:
    """Everything about one site that does not change from call to call. `methods` are those of the chosen backends,
    by role.
    """

    kind: str
    spec: LayerSpec
    methods: tuple[str, str, str]
    site: int
    geometry: ConvGeometry | None = None
    lifetime: str = ""
    """Of BWD's cast of a weight, where it is kept (runtime/quantize/kept_casts.py)."""

    @property
    def contraction(self) -> AbstractContraction:
        return contraction_of(self.kind, self.geometry)

    def contraction_of(self, role: Role) -> AbstractContraction:
        """What lays out the GEMM of one role: a convolution that rounds as it adds is unfolded."""
        if self.geometry is not None and self.method(role) in EMULATED:
            return unfolded(self.geometry)
        return self.contraction

    def method(self, role: Role) -> str:
        return self.methods[("fwd", "bwd", "grad").index(role)]

    @property
    def attributes(self) -> opaque.Attributes:
        """What `parse` reads."""
        geometry = print_geometry(self.geometry) if self.geometry else ""
        return self.kind, str(self.spec), ",".join(self.methods), self.site, geometry

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(kind: str, spec: str, methods: str, site: int, geometry: str, lifetime: str = "") -> "GemmPlan":
        """From the attributes of an lp.gemm node. A geometry reads `stride=1,1 padding=0,0 dilation=1,1 groups=1`."""
        fwd, bwd, grad = methods.split(",")
        return GemmPlan(kind, LayerSpec.parse(spec), (fwd, bwd, grad), site, parse_geometry(geometry), lifetime)


def contraction_of(kind: str, geometry: ConvGeometry | None) -> AbstractContraction:
    """The contraction of a kind of KINDS, or the convolution of this geometry."""
    return KINDS[kind] if geometry is None else Conv(geometry)


def parse_geometry(text: str) -> ConvGeometry | None:
    if not text:
        return None
    fields = {
        key: tuple(int(n) for n in value.split(",")) for key, _, value in (part.partition("=") for part in text.split())
    }
    groups, more = fields["groups"][0], fields.get("output_padding", ())
    return ConvGeometry(fields["stride"], fields["padding"], fields["dilation"], groups, more)


def print_geometry(geometry: ConvGeometry) -> str:
    rows = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": (geometry.groups,),
    }
    if geometry.is_transposed:
        rows["output_padding"] = geometry.output_padding
    return " ".join(f"{key}={','.join(map(str, value))}" for key, value in rows.items())


@dataclass(frozen=True)
class Operand:
    """Grid values and the scale that gives them back their size: `value == grid * expand(scale)`. scale None is 1."""

    grid: Tensor
    scale: Tensor | None
    spec: QuantSpec

    @property
    def pair(self) -> tuple[Tensor, Tensor | None]:
        return self.grid, self.scale


def cast(x: Tensor, spec: QuantSpec, state: RunState | None, site: int, slot: int) -> Operand:
    """x on the grid of `spec`, with its scale, as forward casts do it; detached."""
    scale = compute_scale(x.detach(), spec)
    return Operand(to_grid(x, scale, spec, state, site, slot), scale, spec)


def to_grid(x: Tensor, scale: Tensor | None, spec: QuantSpec, state: RunState | None, site: int, slot: int) -> Tensor:
    """Grid values of x in the storage dtype of the format. An identity spec gives x itself, detached."""
    x = x.detach()
    if spec.is_identity:
        return x
    return fast_to_grid(x, spec, scale, dtype=storage_dtype(spec.format), **_randomness(spec, state, site, slot))


@lru_cache(maxsize=4096)
def storage_dtype(format: str) -> torch.dtype:
    """The dtype that holds the grid values of a format: bf16 where they embed there, which halves what a GEMM reads
    and what backward keeps; fp32 where there is no smaller exact one that is multiplied.
    """
    if format in _STORAGE:
        return _STORAGE[format]
    return torch.bfloat16 if embeds(grid_format(format), "bf16") else torch.float32


def _randomness(spec: QuantSpec, state: RunState | None, site: int, slot: int) -> dict[str, int]:
    if spec.rounding != "stochastic":
        return {}
    state = state or RunState()
    return {"seed": state.seed, "step": state.step, "stream": state.stream(site, slot)}


def _cast_weight(w: Tensor, spec: QuantSpec, state: RunState, plan: GemmPlan) -> Operand:
    """BWD's cast of a weight: a kept one of these bytes, FWD's where it is the same cast, or a new one."""
    slot, kept = _WEIGHT_BWD, None
    if plan.lifetime:
        kept = state.constants.find(w, spec, plan.site, slot, plan.lifetime)
    if kept is None:
        return cast(w, spec, state, plan.site, slot)
    scale = kept.scale_or(lambda: compute_scale(w.detach(), spec))
    return Operand(kept.grid_or(lambda: to_grid(w, scale, spec, state, plan.site, slot)), scale, spec)


def cast_gradient(dy: Tensor, spec: QuantSpec, state: RunState | None, site: int, slot: int) -> Operand:
    if state is None or not state.watch_overflow or spec.is_identity:
        return cast(dy, spec, state, site, slot)
    if torch.compiler.is_compiling():
        watched, one = opaque.cast_watched(dy, str(spec), state, site, slot)
        return Operand(watched, one if spec.has_scale else None, spec)
    scale = compute_scale(dy, spec)
    dtype = storage_dtype(spec.format)
    grid, beyond = fast_to_grid_checked(dy, spec, scale, dtype=dtype, **_randomness(spec, state, site, slot))
    state.note_overflow(beyond)
    return Operand(grid, scale, spec)


def run_gemm(
    lhs: Tensor,
    rhs: Tensor,
    bias: Tensor | None,
    casts: dict[str, Operand | None],
    state: RunState,
    plan: GemmPlan,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """One site, differentiable in lhs, rhs, bias and residual. casts: fwd_lhs, fwd_rhs, bwd_rhs (None: rhs is cast
    again in backward), grad_lhs. A residual has shape and dtype of the result; activation is one of ACTIVATIONS or "".

    Where no role rounds anything and the casts are the carriers themselves, it is torch's own op with torch's own
    backward: no bit changes, whatever order of additions the machine's library has for which transposition.
    """
    check_transforms(plan.spec.is_identity)
    if plan.spec.is_identity and _are_the_carriers(lhs, rhs, casts):
        if not torch.compiler.is_compiling():
            state.gemm_calls += 1
        return followed_by(plan.contraction.native(lhs, rhs, bias), residual, activation)
    flat: list[Tensor | None] = []
    for name in CAST_NAMES:
        operand = casts[name]
        flat += [operand.grid, operand.scale] if operand else [None, None]
    # the residual first: autograd hands out gradients in the order of operands, and an addition would come before
    return _Gemm.apply(residual, lhs, rhs, bias, state, plan, activation, torch.is_grad_enabled(), *flat)


def _are_the_carriers(lhs: Tensor, rhs: Tensor, casts: dict[str, Operand | None]) -> bool:
    if torch.compiler.is_compiling():
        return True  # an identity cast is traced as its input
    carriers = {"fwd_lhs": lhs, "fwd_rhs": rhs, "bwd_rhs": rhs, "grad_lhs": lhs}
    is_alias: Any = vars(torch._C)["_is_alias_of"]
    look = _unwrapped if _is_transformed() else lambda x: x
    return all(cast is None or is_alias(look(cast.grid), look(carriers[name])) for name, cast in casts.items())


def _is_transformed() -> bool:
    """Whether a transform of torch.func runs."""
    return bool(vars(torch._C)["_are_functorch_transforms_active"]())


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor below what the transforms of torch.func put around it."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def check_transforms(is_identity: bool) -> None:
    """Raise NotSupported where a transform of torch.func reaches something that is cast."""
    if not is_identity and not torch.compiler.is_compiling() and _is_transformed():
        raise NotSupported(
            "a transform of torch.func (grad, vmap, jvp) does not go through a product that is cast",
            where="lpcompile",
            hint="loss.backward() or torch.autograd.grad, or a policy that does not name these layers",
        )


CAST_NAMES = ("fwd_lhs", "fwd_rhs", "bwd_rhs", "grad_lhs")


def _differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable, with a sentence of ours for who differentiates what backward gives."""
    torchs = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return torchs(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or not any(grad is not None and grad.requires_grad for grad in grads):
            return results
        return _NoSecond.apply(*(None if x is None else x.detach().requires_grad_() for x in results))

    return run


class _NoSecond(torch.autograd.Function):
    """Gradients that are not differentiated."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else each.view_as(each) for each in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise NotSupported(
            "a product that is cast has no second derivative",
            where="lpcompile",
            expected="each gradient to be differentiated once",
            hint="fp32 or fp32-emulated for what a gradient penalty reads",
        )


class _Gemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor | None,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None,
        state: RunState,
        plan: GemmPlan,
        activation: str,
        is_recording: bool,
        fwd_lhs: Tensor,
        fwd_lhs_scale: Tensor | None,
        fwd_rhs: Tensor,
        fwd_rhs_scale: Tensor | None,
        bwd_rhs: Tensor | None,
        bwd_rhs_scale: Tensor | None,
        grad_lhs: Tensor | None,
        grad_lhs_scale: Tensor | None,
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            state.gemm_calls += 1
        needs_lhs, needs_rhs = ctx.needs_input_grad[1:3]
        ctx.state, ctx.plan, ctx.activation = state, plan, activation
        ctx.lhs_shape, ctx.rhs_shape = lhs.shape, rhs.shape
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.dtypes = lhs.dtype, rhs.dtype, None if bias is None else bias.dtype
        kept = (
            rhs if needs_lhs and bwd_rhs is None else None,
            bwd_rhs if needs_lhs else None,
            bwd_rhs_scale if needs_lhs else None,
            grad_lhs if needs_rhs else None,
            grad_lhs_scale if needs_rhs else None,
        )
        spec = plan.spec.fwd
        a, b = Operand(fwd_lhs, fwd_lhs_scale, spec.lhs), Operand(fwd_rhs, fwd_rhs_scale, spec.rhs)
        if _is_opaque(plan, "fwd"):
            y = multiply_traced("fwd", plan, a, b, bias, lhs.dtype, state)
        elif lhs.dtype == torch.float32 and spec.out == "fp32" and not torch.compiler.is_compiling():
            y = _own(multiply_fwd(plan, a, b, bias, state, residual, activation == "relu"))
            residual = None
        else:
            y = _own(multiply_fwd(plan, a, b, bias, state).to(lhs.dtype))
        y, needed = finish_with(y, residual, activation, keeps=is_recording and any(ctx.needs_input_grad[:4]))
        ctx.save_for_backward(*kept, needed)
        return y

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, state = ctx.plan, ctx.state
        rhs, bwd_rhs, bwd_rhs_scale, grad_lhs, grad_lhs_scale, activated = ctx.saved_tensors
        needs_residual, needs_lhs, needs_rhs, needs_bias = ctx.needs_input_grad[:4]
        dy = activation_grad(dy, activated, ctx.activation)
        bwd, grad = plan.spec.bwd, plan.spec.grad
        dx = dw = db = dy_cast = None
        if needs_lhs:
            dy_cast = cast_gradient(dy, bwd.lhs, state, plan.site, _DY_BWD)
            w = (
                Operand(bwd_rhs, bwd_rhs_scale, bwd.rhs)
                if bwd_rhs is not None
                else _cast_weight(rhs, bwd.rhs, state, plan)
            )
            if _is_opaque(plan, "bwd"):
                dx = multiply_traced("bwd", plan, dy_cast, w, ctx.lhs_shape, ctx.dtypes[0], state)
            else:
                dx = multiply_bwd(plan, dy_cast, w, ctx.lhs_shape, state).to(ctx.dtypes[0])
        if needs_rhs:
            if dy_cast is None or bwd.lhs != grad.lhs or grad.lhs.rounding == "stochastic":
                dy_cast = cast_gradient(dy, grad.lhs, state, plan.site, _DY_GRAD)
            x = Operand(grad_lhs, grad_lhs_scale, grad.rhs)
            if _is_opaque(plan, "grad"):
                dw = multiply_traced("grad", plan, dy_cast, x, ctx.rhs_shape, ctx.dtypes[1], state)
            else:
                dw = multiply_grad(plan, dy_cast, x, ctx.rhs_shape, state).to(ctx.dtypes[1])
        if needs_bias:
            db = plan.contraction.bias_grad(dy).sum_to_size(ctx.bias_shape).to(ctx.dtypes[2])
        return dy if needs_residual else None, dx, dw, db, *(None,) * 12


def _own(y: Tensor) -> Tensor:
    """y, not as a view of the matrix that it was computed as, which nothing else holds: a caller may write into it."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    owned: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return owned


def _is_opaque(plan: GemmPlan, role: Role) -> bool:
    """Whether the role is one op of runtime/ops/traced.py; torch's own op is left to the compiler."""
    return torch.compiler.is_compiling() and plan.method(role) != "as_is"


def multiply_traced(
    role: Role, plan: GemmPlan, a: Operand, b: Operand, rest: Tensor | Sequence[int] | None, dtype: torch.dtype,
    state: RunState | None,
) -> Tensor:  # fmt: skip
    """One role as compiled code has it: the opaque product, and its scales in operations that fuse with what follows.
    rest: FWD's bias, else the shape of the result, which is in `dtype`.
    """
    if not has_free_scales(plan, role, a, b):
        return opaque.multiply(role, plan.attributes, a.pair, b.pair, rest, dtype, state)
    bare = rest if role != "fwd" else None
    y = opaque.multiply(role, plan.attributes, (a.grid, None), (b.grid, None), bare, torch.float32, state)
    bias = rest if isinstance(rest, Tensor) else None
    return with_scales(role, plan, y, a.scale, b.scale, bias).to(dtype)


def has_free_scales(plan: GemmPlan, role: Role, a: Operand, b: Operand) -> bool:
    """Whether all that is left to do after the product of a linear layer is to multiply by scales and add the bias."""
    if plan.kind not in ("linear", "linear_kn") or plan.spec.role(role).out != "fp32" or a.scale is b.scale is None:
        return False
    sides: tuple[tuple[Side, Operand], ...] = (("lhs", a), ("rhs", b))
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
    x: Operand,
    w: Operand,
    bias: Tensor | None,
    state: RunState,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """FWD with what follows it, in the dtype that the method gives."""
    spec, method, kind = plan.spec.fwd, plan.method("fwd"), plan.contraction_of("fwd")
    x, w = _foldable(plan, "fwd", x, w)
    unscaled = x.scale is None and w.scale is None
    if method in ("as_is", "fp32") and unscaled and spec.out == "fp32":
        y = kind.native(
            _load(x.grid, method), _load(w.grid, method), bias if bias is None or method == "as_is" else bias.float()
        )
        return add_and_relu(y, residual, relu)
    if method == "cpu_bf16" and unscaled and spec.out == "fp32":
        add_bias = partial(cpu_gemm.multiply, bias_N=None if bias is None else bias.float())
        return add_and_relu(kind.fwd(_load(x.grid, method), _load(w.grid, method), add_bias), residual, relu)
    if plan.geometry is not None:
        y = kind.fwd(_load(x.grid, method), _load(w.grid, method), _product(plan, "fwd", x, w, state))
        if spec.out == "fp32" and y.is_contiguous() and all(s is None or s.dim() == 0 for s in (x.scale, w.scale)):
            return _finish_conv(plan.geometry, y, x.scale, w.scale, bias, residual, relu)
        y = _scaled(y, x.scale, _per_channel(w.scale, plan.geometry))
    else:
        is_one_pass = spec.out == "fp32" and plan.kind != "matmul"
        after = (bias, residual, relu) if is_one_pass else (None, None, False)
        y = kind.fwd(_load(x.grid, method), _load(w.grid, method), _product(plan, "fwd", x, w, state, after=after))
        if is_one_pass:
            return y
    y = _round_out(y, spec, method)
    if bias is not None:
        y = y + (bias if plan.geometry is None else bias.view(-1, *(1,) * len(plan.geometry.stride)))
    return add_and_relu(y, residual, relu)


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


def multiply_bwd(plan: GemmPlan, dy: Operand, w: Operand, lhs_shape: torch.Size, state: RunState) -> Tensor:
    spec, method = plan.spec.bwd, plan.method("bwd")
    dy, w = _foldable(plan, "bwd", dy, w)
    lhs, rhs = _load(dy.grid, method), _load(w.grid, method)
    dx = plan.contraction_of("bwd").bwd(lhs, rhs, lhs_shape, _product(plan, "bwd", dy, w, state))
    return _round_out(dx if plan.geometry is None else _scaled(dx, dy.scale, w.scale), spec, method)


def multiply_grad(plan: GemmPlan, dy: Operand, x: Operand, rhs_shape: torch.Size, state: RunState) -> Tensor:
    spec, method = plan.spec.grad, plan.method("grad")
    dy, x = _foldable(plan, "grad", dy, x)
    multiply = _product(plan, "grad", dy, x, state, is_swapped=plan.contraction.grad_rows == "rhs")
    dw = plan.contraction_of("grad").grad(_load(dy.grid, method), _load(x.grid, method), rhs_shape, multiply)
    return _round_out(dw if plan.geometry is None else _scaled(dw, dy.scale, x.scale), spec, method)


def _load(grid: Tensor, method: str) -> Tensor:
    """Grid values in a dtype that the method multiplies; exact either way."""
    if method == "as_is":
        return grid
    if method == "cpu_bf16":  # it reads fp32 too: block values below bf16's range
        return grid if grid.dtype in cpu_gemm.DTYPES else grid.bfloat16()
    dtype = DTYPES.get(method, torch.float32)
    return grid if dtype == torch.int8 and grid.dtype == torch.float32 else grid.to(dtype)  # fp32: it holds a NaN


def _round_out(y: Tensor, spec: GemmSpec, method: str) -> Tensor:
    if spec.out == "fp32" or method == spec.out:
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
    lhs: Operand,
    rhs: Operand,
    state: RunState,
    is_swapped: bool = False,
    after: tuple[Tensor | None, Tensor | None, bool] = (None, None, False),
) -> Multiply:
    """The backend's product, times the scales of its rows and columns; `is_swapped` if rhs gives the rows. `after`:
    bias, residual and whether a relu comes.
    """
    bias, residual, relu = after
    spec, key = plan.spec.role(role), NO_KEY
    rows, columns = (rhs, lhs) if is_swapped else (lhs, rhs)
    if is_swapped:
        spec = replace(spec, lhs=spec.rhs, rhs=spec.lhs)
    if spec.accumulator.mode == "stochastic":
        key = RandomKey(state.seed, state.step, state.stream(plan.site, _ACCUMULATE[role]))
    multiply = multiplier(plan.method(role), spec, key)
    if plan.geometry is not None or (rows.scale is columns.scale is bias is residual is None and not relu):
        return multiply  # the result of a conv is scaled
    batched = plan.kind == "matmul"

    def run(a: Tensor, b: Tensor) -> Tensor:
        y = multiply(a, b)
        summand = None if residual is None else residual.reshape(y.shape)
        return finish(y, _along(rows, "row", batched), _along(columns, "column", batched), bias, summand, relu)

    return run


def _along(operand: Operand, axis: str, batched: bool) -> Tensor | None:
    """The operand's free scale, laid along the rows or the columns of a product."""
    scale = operand.scale
    if scale is None or scale.dim() == 0:
        return scale
    if not batched:
        return scale.reshape((-1, 1) if axis == "row" else (1, -1))
    assert operand.spec.scale is not None
    return scale if operand.spec.scale.granularity == axis else scale.transpose(-1, -2)


def _foldable(plan: GemmPlan, role: Role, lhs: Operand, rhs: Operand) -> tuple[Operand, Operand]:
    """Multiply into the grid values any scale that varies along the sum, as the head of this file says."""
    sides: tuple[tuple[Side, Operand], ...] = (("lhs", lhs), ("rhs", rhs))
    folded = []
    for side, operand in sides:
        if operand.scale is not None and varies_along_sum(plan.contraction, role, side, operand.spec):
            value = operand.grid.float() * expand_scale(operand.scale, operand.grid.shape, operand.spec)
            operand = replace(operand, grid=value, scale=None)
        folded.append(operand)
    return folded[0], folded[1]
