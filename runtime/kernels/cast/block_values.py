"""Block values: what `quantize` gives on a block format, by the fastest path there is.

    lp::quantize_block_values         x rounded, in x's dtype
    lp::quantize_block_values_into    the same into a tensor that is there

The first has the straight-through gradient of lp::quantize_values. A compiler fuses nothing into it: the scale
of a block is decided by bits of its largest element, for which no compiler here makes vector code.
"""

from typing import Any

import torch
from torch import Tensor

from runtime.kernels.cast.traced import Draw
from runtime.kernels.cast_plans import block_plan, corrected_plan
from runtime.kernels.cpu.address import can_be_written
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.kernels.cpu.grid import on_grid
from runtime.kernels.cpu.odd import odd_in_fp32
from runtime.kernels.torch_ops import declare
from runtime.numerics.block_casts import quantize_blocks
from runtime.numerics.block_formats import BlockFormat, get_block_format, is_block_format
from runtime.numerics.format_kinds import Format
from runtime.numerics.formats import get_format, name_of
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.specs import Rounding


def block_values(
    x: Tensor, format: str | BlockFormat, rounding: Rounding | None, draw: Draw, out: Tensor | None = None
) -> Tensor:
    """x on the grid of a block format, in x's dtype, no gradient. rounding None is that of the elements' row.

    `out`: where to write, of x's shape and dtype; it is not looked at in compiled code.
    """
    name = format if isinstance(format, str) else format.name
    if not isinstance(format, str) and not (is_block_format(name) and get_block_format(name) == format):
        values = quantize_blocks(x, format, rounding, **draw._asdict())  # no text says what it is
        return values if out is None else out.copy_(values)
    call = (name, rounding, signed_seed(draw.seed), *draw[1:])
    if out is not None and not torch.compiler.is_compiling():
        torch.ops.lp.quantize_block_values_into(x.detach(), out, *call)
        return out
    given: Tensor = torch.ops.lp.quantize_block_values(x.detach(), *call)
    return given


def _block_values(
    x: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    row, draw = get_block_format(format), Draw(seed, step, stream, offset)
    mode = rounding or get_format(row.element).rounding
    if mode == "stochastic":
        check_counter(*draw[1:])
    fast = fast_blocks(
        _narrowed(x, row, mode) if x.dtype == torch.float64 and out is None else x,
        row,
        block_plan(row, mode),
        is_divided=True,
        is_stochastic=mode == "stochastic",
        corrected=corrected_plan(row, mode),
        out=out,
        **draw._asdict(),
    )
    if fast is not None:
        return fast.values if out is not None else fast.values.to(x.dtype)
    values = _in_pieces(x, row, mode, draw) if not row.is_two_level else quantize_blocks(x, row, mode, **draw._asdict())
    return values if out is None else out.copy_(values)


def _narrowed(x: Tensor, row: BlockFormat, mode: Rounding) -> Tensor:
    """float64 in fp32 where the block cast of that is the same: nvfp4 rounds it to fp32 before anything else, an MX
    format's scale and elements are those of x rounded to odd. Random bits decide by more bits than fp32 has left.
    """
    if row.is_two_level:
        return x.float()
    odd = None if mode == "stochastic" else odd_in_fp32(x)
    return x if odd is None else odd


def _in_pieces(x: Tensor, row: BlockFormat, mode: Rounding, draw: Draw) -> Tensor:
    """By the oracle's steps, a few rows at a time, so that what lies between the steps stays in a cache."""
    out, columns = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1] if x.dim() else 1
    step = max(1, _PIECE // max(1, columns))
    matrix, values = x.reshape(-1, max(1, columns)), out.view(-1, max(1, columns))
    for first in range(0, len(matrix), step):
        place = draw._replace(offset=draw.offset + first * columns)
        piece = matrix[first : first + step]
        values[first : first + step] = quantize_blocks(piece, row, mode, **place._asdict(), round_with=_round)
    return out


def _round(
    x: Tensor, row: Format, rounding: Rounding, scale: Tensor | None, seed: int, step: int, stream: int, offset: int
) -> Tensor:
    """round_to_grid, by a kernel: of fp64 blocks, whose scales are the oracle's."""
    return on_grid(x, name_of(row), rounding, scale, seed, step, stream, offset)


def _block_values_into(
    x: Tensor, out: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int
) -> None:
    is_written = x.dtype == torch.float32 and can_be_written(out, x)
    values = _block_values(x, format, rounding, seed, step, stream, offset, out if is_written else None)
    if not is_written:
        out.copy_(values)


def _shape(x: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int) -> Tensor:
    get_block_format(format)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _nothing(
    x: Tensor, out: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int
) -> None:
    return None


def _straight_through(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None, None


_PIECE = 1 << 16
"""Elements."""
_WHAT = "str format, str? rounding, SymInt seed, SymInt step, SymInt stream, SymInt offset"
declare(f"quantize_block_values(Tensor x, {_WHAT}) -> Tensor", _block_values, fake=_shape, backward=_straight_through)
declare(f"quantize_block_values_into(Tensor x, Tensor(a!) out, {_WHAT}) -> ()", _block_values_into, fake=_nothing)
