"""The three GEMMs of a layer as one autograd function: FWD y = x.w, BWD dx = dy.w, GRAD dw = dy.x.

Straight-through: the casts of x and w have derivative one, so x and w enter twice, once as the carrier of the gradient
and once as the values that are multiplied. Backward keeps the cast operands that BWD and GRAD need and not the
originals; BWD's cast of a weight is made in backward from the parameter itself, or found there among the casts that
runtime/quantize/kept_casts.py keeps, so that nothing outlives a partitioned or resharded weight.

    y = out(sum_k q_x[m,k] q_w[n,k] * s_x[m] s_w[n] + bias)         `out` is the last step, and rounds once

    z = activation(y + residual)        what follows a product may be a part of it, with the bits of separate ops

Each role is one torch op with all that follows it (products.py).

dy is cast here, once when BWD and GRAD cast it alike. A gradient operand beyond its format's maximum saturates, and
sets `state.overflow` when `state.watch_overflow` asks for it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from runtime.errors import NotSupported
from runtime.kernels.cast.block_grid import fast_block_cast, is_one_op
from runtime.kernels.cast.grid import fast_to_grid_checked
from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.torch_ops import has_transforms
from runtime.numerics.free_axes import Side
from runtime.numerics.specs import QuantSpec, Role
from runtime.ops import observed
from runtime.ops.activations import activation_grad, followed_by, needed_by
from runtime.ops.draws import draw_of
from runtime.ops.kept import keep_operand, note_kept, restore_operand
from runtime.ops.plan import GemmPlan
from runtime.ops.products import multiply, multiply_traced, own
from runtime.quantize.kept_casts import Kept
from runtime.quantize.owners import operand_of, owner_of
from runtime.quantize.qtensor import CastKey, QTensor
from runtime.quantize.quantizer import to_grid, turned
from runtime.quantize.stateless import quantizer_of
from runtime.quantize.storage import storage_dtype
from runtime.state import RunState
from runtime.streams import NO_CLOCK, Turn

DY_BWD, DY_GRAD, WEIGHT_BWD = 4, 5, 6
"""Operand slots of the random streams; 0 to 3 are the casts of the forward graph, 7 to 9 the sums."""


def cast(x: Tensor, spec: QuantSpec, turn: RunState | Turn | None, site: int, slot: int) -> QTensor:
    """x on the grid of `spec`, which says everything, with its scale; detached. `turn`: of this call of the site, or
    the state whose clock it reads.
    """
    return quantizer_of(spec).cast(x, draw_of(spec, turn, site, slot))


def _cast_weight(w: Tensor, spec: QuantSpec, state: RunState, plan: GemmPlan, turn: Turn | None) -> QTensor:
    """BWD's cast of a weight: a kept one of these bytes, FWD's where it is the same cast, or a new one."""
    slot, kept = WEIGHT_BWD, None
    if spec.observes:
        owner, draw = owner_in(plan, "bwd", "rhs"), draw_of(spec, turn, plan.site, slot)
        if spec != plan.spec.fwd.rhs:
            return observed.cast_backward(w, state, owner, draw)[0]
        return observed.cast_again(w, state, owner, draw, lambda key: _find(w, key, state, plan, slot))
    if plan.lifetime:
        kept = state.constants.find(w, CastKey(spec), plan.site, slot, plan.lifetime)
    if kept is None:
        return cast(w, spec, turn, plan.site, slot)
    scale = kept.scale_or(lambda: compute_scale(w.detach(), spec))
    return QTensor(kept.grid_or(lambda: to_grid(w, scale, spec)), scale, spec)  # what is kept draws nothing


def _find(w: Tensor, key: CastKey, state: RunState, plan: GemmPlan, slot: int) -> Kept | None:
    return state.constants.find(w, key, plan.site, slot, plan.lifetime) if plan.lifetime else None


def owner_in(plan: GemmPlan, role: Role, side: Side) -> str:
    """The name of the quantizer with state of an operand, or what it would have."""
    return owner_of(plan.name or "", operand_of(plan.spec, role, side))


def cast_gradient(
    dy: Tensor, spec: QuantSpec, state: RunState | None, site: int, slot: int, turn: Turn | None = None, owner: str = ""
) -> QTensor:
    """A cast that notes an overflow in `state`, where that watches for it; `turn` as in `cast`. owner: the name of the
    operand (runtime/quantize/owners.py). Under a scale that follows the gradient only NaN and Inf are an overflow.
    """
    if state is None or spec.is_identity or not (state.watch_overflow or spec.observes):
        return cast(dy, spec, turn or state, site, slot)
    if torch.compiler.is_compiling():
        clock = (turn or state).clock if spec.is_stochastic else NO_CLOCK
        watched, one = torch.ops.lp.cast_gradient(dy, str(spec), clock, state.key, site, slot, owner)
        return QTensor(watched, one if spec.has_scale else None, spec)
    draw, dtype = draw_of(spec, turn or state, site, slot), storage_dtype(spec.format)
    if spec.observes:
        made, amax = observed.cast_backward(dy, state, owner, draw)
        if state.watch_overflow:
            state.note_overflow(~amax.isfinite(), *_place(owner, slot))
        return made
    if is_one_op(dy, spec):
        of_blocks, divided, is_bad = fast_block_cast(dy, spec, dtype=dtype, **draw._asdict())
        state.note_overflow(is_bad, *_place(owner, slot))
        return QTensor(of_blocks, divided, spec)
    dy = turned(dy, spec, draw)
    scale = compute_scale(dy, spec)
    seed, step, stream, _ = draw
    grid, beyond = fast_to_grid_checked(dy, spec, scale, dtype=dtype, seed=seed, step=step, stream=stream)
    state.note_overflow(beyond, *_place(owner, slot))
    return QTensor(grid, scale, spec)


def _place(owner: str, slot: int) -> tuple[str, str]:
    """Site and role of a gradient."""
    return owner.rpartition(".")[0], "bwd" if slot == DY_BWD else "grad"


def run_gemm(
    lhs: Tensor,
    rhs: Tensor,
    bias: Tensor | None,
    casts: dict[str, QTensor | None],
    state: RunState,
    plan: GemmPlan,
    residual: Tensor | None = None,
    activation: str = "",
    turn: Turn | None = None,
) -> Tensor:
    """One site, differentiable in lhs, rhs, bias and residual. `turn` keys its random bits, else the state's clock does
    as it is now, in backward too. casts: fwd_lhs, fwd_rhs, bwd_rhs (None: rhs is cast
    again in backward), grad_lhs. A residual has shape and dtype of the result; activation is one of ACTIVATIONS or "".

    Where no role rounds anything and the casts are the carriers themselves, it is torch's own op with torch's own
    backward: no bit changes, whatever order of additions the machine's library has for which transposition.
    """
    check_transforms(plan.spec.is_identity, lhs, rhs, bias, residual)
    if plan.spec.is_identity and _are_the_carriers(lhs, rhs, casts):
        if not torch.compiler.is_compiling():
            note_call(state, plan, "fwd")
        lhs, rhs, bias = under_autocast(lhs, rhs, bias)
        return followed_by(plan.contraction.native(lhs, rhs, bias), residual, activation)
    flat: list[Tensor | None] = []
    for name in CAST_NAMES:
        operand = casts[name]
        flat += [operand.grid, operand.scale] if operand else [None, None]
    # the residual first: autograd hands out gradients in the order of operands, and an addition would come before
    if turn is None and plan.spec.is_stochastic:
        turn = Turn(state.clock, plan.site)
    return _Gemm.apply(residual, lhs, rhs, bias, state, turn, plan, activation, torch.is_grad_enabled(), *flat)


def note_call(state: RunState, plan: GemmPlan, role: Role) -> None:
    """One product ran as planned."""
    note_ran(state, plan.name, role)


def note_ran(state: RunState, name: str | None, role: Role) -> None:
    """One product of the site `name` ran as planned; None: it is no site of a policy."""
    if role == "fwd":
        state.gemm_calls += 1
    if name is not None:
        state.calls.ran(name, role)


def note_backward(state: RunState, plan: GemmPlan, role: Role) -> None:
    if plan.name is not None and not torch.compiler.is_compiling():
        state.calls.ran(plan.name, role)


def _are_the_carriers(lhs: Tensor, rhs: Tensor, casts: dict[str, QTensor | None]) -> bool:
    if torch.compiler.is_compiling():
        return True  # an identity cast is traced as its input
    carriers = {"fwd_lhs": lhs, "fwd_rhs": rhs, "bwd_rhs": rhs, "grad_lhs": lhs}
    is_alias: Any = vars(torch._C)["_is_alias_of"]
    look = _unwrapped if has_transforms() else lambda x: x
    return all(cast is None or is_alias(look(cast.grid), look(carriers[name])) for name, cast in casts.items())


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor below what the transforms of torch.func put around it."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def check_transforms(is_identity: bool, *operands: Tensor | None) -> None:
    """Raise NotSupported where a transform of torch.func, or a tangent of forward-mode differentiation, reaches
    something that is cast.
    """
    if is_identity or torch.compiler.is_compiling() or not (has_transforms() or any(map(_has_tangent, operands))):
        return
    raise NotSupported(
        "a transform of torch.func (grad, vmap, jvp), or a tangent, does not go through a product that is cast",
        where="lpcompile",
        expected="tensors that no transform wraps",
        got="a transform of torch.func" if has_transforms() else "a tangent",
        hint="loss.backward() or torch.autograd.grad, or a policy that does not name these layers",
    )


def check_whole(name: str, *operands: Tensor) -> None:
    """Raise NotSupported for operands of a cast product that tensor parallelism shards."""
    library = sys.modules.get("torch.distributed.tensor")  # whoever has a DTensor has loaded it
    if library is None or not any(isinstance(x, library.DTensor) for x in operands):
        return
    raise NotSupported(
        "tensor parallelism shards an operand, and a product of shards is not cast",
        where=f"{name or '(root)'}, lpcompile",
        expected="plain tensors when the layer runs, as under DDP, FSDP and ZeRO",
        got=" and ".join(type(x).__name__ for x in operands),
        hint="fully_shard in the place of parallelize_module, or a policy that does not name this layer",
    )


def _has_tangent(x: Tensor | None) -> bool:
    is_differentiating = forward_ad._current_level >= 0
    return is_differentiating and x is not None and forward_ad.unpack_dual(x).tangent is not None


def under_autocast(lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands of torch's own op in the dtype of autocast, of which aten's own convolution knows nothing."""
    if lhs.is_meta or not torch.is_autocast_enabled(lhs.device.type):
        return lhs, rhs, bias
    dtype = result_dtype(lhs)
    return lhs.to(dtype), rhs.to(dtype), None if bias is None else bias.to(dtype)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what a product of x gives: under autocast what torch's own would, else x's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


CAST_NAMES = ("fwd_lhs", "fwd_rhs", "bwd_rhs", "grad_lhs")


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable, with a sentence of ours for who differentiates what backward gives."""
    torchs = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return torchs(ctx, *grads)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not any(grad is not None and grad.requires_grad for grad in grads):
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
        turn: Turn | None,
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
            note_call(state, plan, "fwd")
        needs_lhs, needs_rhs = ctx.needs_input_grad[1:3]
        ctx.state, ctx.turn, ctx.plan, ctx.activation = state, turn, plan, activation
        ctx.lhs_shape, ctx.rhs_shape = lhs.shape, rhs.shape
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.dtypes = lhs.dtype, rhs.dtype, None if bias is None else bias.dtype
        layer, spec = plan.spec, plan.spec.fwd
        kept_rhs = keep_operand(bwd_rhs if needs_lhs else None, layer.bwd.rhs, layer.keep, rhs)
        kept_lhs = keep_operand(grad_lhs if needs_rhs else None, layer.grad.rhs, layer.keep, lhs)
        ctx.forms = kept_rhs.form, kept_lhs.form
        kept = (
            rhs if needs_lhs and bwd_rhs is None else None,
            kept_rhs.saved,
            bwd_rhs_scale if needs_lhs else None,
            kept_lhs.saved,
            grad_lhs_scale if needs_rhs else None,
        )
        note_kept(state, plan.name, "bwd", kept[1], kept[2])
        note_kept(state, plan.name, "grad", kept[3], kept[4])
        a, b = QTensor(fwd_lhs, fwd_lhs_scale, spec.lhs), QTensor(fwd_rhs, fwd_rhs_scale, spec.rhs)
        keeps = is_recording and any(ctx.needs_input_grad[:4])
        y, needed = _finished(plan, a, b, bias, result_dtype(lhs), turn, residual, activation, keeps)
        ctx.save_for_backward(*kept, needed)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, state, turn = ctx.plan, ctx.state, ctx.turn
        rhs, bwd_rhs, bwd_rhs_scale, grad_lhs, grad_lhs_scale, activated = ctx.saved_tensors
        needs_residual, needs_lhs, needs_rhs, needs_bias = ctx.needs_input_grad[:4]
        dy = activation_grad(dy, activated, ctx.activation)
        bwd, grad = plan.spec.bwd, plan.spec.grad
        dx = dw = db = dy_cast = None
        if needs_lhs:
            note_backward(state, plan, "bwd")
            grid = restore_operand(bwd_rhs, ctx.forms[0])
            dy_cast = cast_gradient(dy, bwd.lhs, state, plan.site, DY_BWD, turn, owner_in(plan, "bwd", "lhs"))
            w = (
                QTensor(grid, bwd_rhs_scale, bwd.rhs)
                if grid is not None
                else _cast_weight(rhs, bwd.rhs, state, plan, turn)
            )
            dx = _gradient("bwd", plan, dy_cast, w, ctx.lhs_shape, ctx.dtypes[0], turn)
        if needs_rhs:
            note_backward(state, plan, "grad")
            if dy_cast is None or bwd.lhs != grad.lhs or grad.lhs.is_stochastic:
                dy_cast = cast_gradient(dy, grad.lhs, state, plan.site, DY_GRAD, turn, owner_in(plan, "grad", "lhs"))
            grid = restore_operand(grad_lhs, ctx.forms[1])
            assert grid is not None
            x = QTensor(grid, grad_lhs_scale, grad.rhs)
            del grid
            dw = _gradient("grad", plan, dy_cast, x, ctx.rhs_shape, ctx.dtypes[1], turn)
        if needs_bias:
            db = plan.contraction.bias_grad(dy).sum_to_size(ctx.bias_shape).to(ctx.dtypes[2])
        return dy if needs_residual else None, dx, dw, db, *(None,) * 13


def _finished(
    plan: GemmPlan, a: QTensor, b: QTensor, bias: Tensor | None, dtype: torch.dtype, turn: Turn | None,
    residual: Tensor | None, activation: str, keeps: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """FWD with what follows it, and what the activation's backward needs where it `keeps` that."""
    is_as_is = plan.kernel("fwd").is_own_op
    if torch.compiler.is_compiling():  # what follows is left to the compiler
        y = _native(plan, a, b, bias, dtype) if is_as_is else multiply_traced("fwd", plan, a, b, bias, dtype, turn)
        y = y if residual is None else y + residual
        return needed_by(activation, torch.relu(y) if activation == "relu" else y)
    if is_as_is and residual is None and not activation:
        return _native(plan, a, b, bias, dtype), None
    inside = activation if activation == "relu" or not keeps else ""
    y = multiply("fwd", plan, a, b, bias, dtype, turn, residual, inside)
    return needed_by(activation, y) if keeps else (y, None)


@torch.no_grad()
def forward_of(plan: GemmPlan, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """FWD in fp32, where nothing is cast yet and nothing stochastic."""
    spec = plan.spec.fwd
    a, b = cast(x, spec.lhs, None, plan.site, 0), cast(w, spec.rhs, None, plan.site, 1)
    return multiply("fwd", plan, a, b, bias, x.dtype, None)


def gradient_of(role: Role, plan: GemmPlan, state: RunState, dy: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
    """BWD from w, or GRAD from x, in fp32, where nothing is cast yet and nothing stochastic."""
    spec, slot = plan.spec.role(role), DY_BWD if role == "bwd" else DY_GRAD
    note_backward(state, plan, role)
    dy_cast = cast_gradient(dy, spec.lhs, state, plan.site, slot, owner=owner_in(plan, role, "lhs"))
    if role == "bwd":
        return _gradient(role, plan, dy_cast, _cast_weight(other, spec.rhs, state, plan, None), shape, dy.dtype, None)
    return _gradient(role, plan, dy_cast, cast(other, spec.rhs, None, plan.site, 3), shape, dy.dtype, None)


def _native(plan: GemmPlan, a: QTensor, b: QTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return own(plan.contraction.native(a.grid, b.grid, bias).to(dtype))


def _gradient(
    role: Role, plan: GemmPlan, dy: QTensor, other: QTensor, shape: torch.Size, dtype: torch.dtype, turn: Turn | None
) -> Tensor:
    """BWD or GRAD: torch's own op where nothing is cast, else one op of products.py."""
    if not plan.kernel(role).is_own_op:
        run = multiply_traced if torch.compiler.is_compiling() else multiply
        return run(role, plan, dy, other, shape, dtype, turn)
    of_role = plan.contraction.bwd if role == "bwd" else plan.contraction.grad
    return of_role(dy.grid, other.grid, shape, torch.matmul).to(dtype)
