"""Value cast: what `quantize` gives on a scalar format, in one pass of C++ where that serves, as a torch op.

    lp::quantize_values        x rounded, in x's dtype; saturating unless `overflow` says otherwise
    lp::quantize_values_into   the same into a tensor that is there

The ops have a fake and a gradient, so fx, export and make_fx keep them as one node. Their gradient is straight-through,
dx = dy: rounding is left out of the derivative and saturation with it (Bengio, Leonard, Courville 2013). The public
`quantize` detaches its argument first and gives no gradient. On CUDA the Triton kernel runs, and the oracle where that
cannot. On the CPU fp64 and overflow="ieee" are rounded in double by grid.cpp; without a compiler the oracle serves.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from runtime.kernels.cast.traced import Draw
from runtime.kernels.cast_plans import cast_plan, table_plan
from runtime.kernels.cpu.address import can_be_written
from runtime.kernels.cpu.cast_library import cast_library, is_readable, run_cast
from runtime.kernels.cpu.grid import on_grid
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.torch_ops import declare
from runtime.kernels.triton import is_readable_by_triton
from runtime.numerics.embedding import embeds
from runtime.numerics.formats import get_format
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.scaling import matrix_shape
from runtime.numerics.specs import Rounding

Overflow = Literal["saturate", "ieee"]


def is_served(x: Tensor, format: str, rounding: Rounding, scale: Tensor | None) -> bool:
    """Whether a kernel takes this cast; the oracle has all others."""
    plan = cast_plan(format, rounding)
    if scale is not None and torch.broadcast_shapes(x.shape, scale.shape) != x.shape:
        return False
    if is_readable_by_triton(x):
        return plan is not None
    has_plan = plan is not None or table_plan(format, rounding) is not None
    return has_plan and is_readable(x) and cast_library() is not None


def fast_values(
    x: Tensor, format: str, rounding: Rounding, scale: Tensor | None, draw: Draw, out: Tensor | None = None
) -> Tensor:
    """round(x / scale) * scale in x's dtype, no gradient. `scale`: fp32, positive, broadcast against x. `is_served`
    must hold. `out`: x's shape and dtype, whatever memory it shares with x and the scale.
    """
    given = (format, rounding, signed_seed(draw.seed), *draw[1:])
    if rounding == "stochastic":
        check_counter(*draw[1:])
    if out is None:
        values: Tensor = torch.ops.lp.quantize_values(x.detach(), scale, *given)
        return values
    torch.ops.lp.quantize_values_into(x.detach(), scale, out, *given)
    return out


def opaque_values(
    x: Tensor, format: str, rounding: Rounding | None, scale: Tensor | None, draw: Draw, overflow: Overflow
) -> Tensor:
    """Any cast to a scalar format as one op, for code that is compiled. A rounding of None is the row's own."""
    if rounding == "stochastic":
        check_counter(*draw[1:])
    given = (format, rounding, signed_seed(draw.seed), *draw[1:], overflow)
    values: Tensor = torch.ops.lp.quantize_values(x.detach(), scale, *given)
    return values


def _values(
    x: Tensor, scale: Tensor | None, format: str, rounding: Rounding | None, seed: int, step: int, stream: int,
    offset: int, overflow: Overflow = "saturate",
) -> Tensor:  # fmt: skip
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mode = rounding or get_format(format).rounding
    if overflow == "saturate":
        _values_into(x, scale, out, format, mode, seed, step, stream, offset)
    else:
        q = on_grid(x, format, mode, scale, seed, step, stream, offset, overflow, out if scale is None else None)
        if q is not out:
            out.copy_(q if scale is None else q * scale)
    return out


def _values_into(
    x: Tensor, scale: Tensor | None, out: Tensor, format: str, rounding: Rounding, seed: int, step: int, stream: int,
    offset: int,
) -> None:  # fmt: skip
    draw = Draw(seed, step, stream, offset)
    if not can_be_written(out, x, scale):
        out.copy_(_values(x, scale, format, rounding, *draw))
    elif not is_served(x, format, rounding, scale):
        q = on_grid(x, format, rounding, scale, *draw, out=out if scale is None else None)
        if q is not out:
            out.copy_(q if scale is None else q * scale)
    elif x.is_cuda:
        out.copy_(_on_cuda(x, scale, format, rounding, draw))
    else:
        _on_cpu(x, scale, out, format, rounding, draw)


def _on_cpu(x: Tensor, scale: Tensor | None, out: Tensor, format: str, rounding: Rounding, draw: Draw) -> None:
    plan = cast_plan(format, rounding) or table_plan(format, rounding)
    assert plan is not None
    random = random_plan(*draw) if rounding == "stochastic" else None
    # A product by the scale, and a grid that x's dtype does not hold, are rounded to that dtype by torch.
    is_exact = scale is None and embeds(get_format(format), _NAMES[x.dtype])
    into = out if x.dtype == torch.float32 or is_exact else torch.empty(x.shape, dtype=torch.float32, device="cpu")
    factors, tile = (None, (1, 1)) if scale is None else tiles(scale, x.shape)
    run_cast(plan, x, into, factors, tile, random, is_multiplied=True)
    if into is not out:
        out.copy_(into)


def _on_cuda(x: Tensor, scale: Tensor | None, format: str, rounding: Rounding, draw: Draw) -> Tensor:
    from runtime.kernels.triton.cast import launch_cast  # imports triton

    plan = cast_plan(format, rounding)
    assert plan is not None
    factors, tile = (None, matrix_shape(x.shape)) if scale is None else tiles(scale, x.shape)
    random = (draw.seed, draw.step, draw.stream, draw.offset) if rounding == "stochastic" else None
    grid, _ = launch_cast(x.contiguous(), factors, plan, torch.float32, tile, random)
    return grid if scale is None else grid * scale


def tiles(scale: Tensor, x_shape: torch.Size) -> tuple[Tensor, tuple[int, int]]:
    """The scale as the kernels read it: one number for each tile of the matrix view, and the tile."""
    m, k = matrix_shape(x_shape)
    if scale.numel() == 1:
        return scale.contiguous(), (m, k)
    if scale.shape == (*x_shape[:-1], 1):
        return scale.contiguous(), (1, k)
    if scale.numel() == k == scale.shape[-1]:
        return scale.contiguous(), (m, 1)
    return scale.expand(x_shape).contiguous(), (1, 1)


def _shape(
    x: Tensor, scale: Tensor | None, format: str, rounding: Rounding | None, seed: int, step: int, stream: int,
    offset: int, overflow: Overflow = "saturate",
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def _nothing(
    x: Tensor, scale: Tensor | None, out: Tensor, format: str, rounding: Rounding, seed: int, step: int, stream: int,
    offset: int,
) -> None:  # fmt: skip
    return None


def _straight_through(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, *[None] * 8


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WHAT = "str format, str? rounding, SymInt seed, SymInt step, SymInt stream, SymInt offset"
declare(
    f'quantize_values(Tensor x, Tensor? scale, {_WHAT}, str overflow="saturate") -> Tensor',
    _values, fake=_shape, backward=_straight_through,
)  # fmt: skip
declare(f"quantize_values_into(Tensor x, Tensor? scale, Tensor(a!) out, {_WHAT}) -> ()", _values_into, fake=_nothing)
