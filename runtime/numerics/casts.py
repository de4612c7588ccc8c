"""Casts: the grid values of a tensor under a QuantSpec - the oracle that every cast kernel is held against.

Rounding and saturation are in grid.py, codes in codes.py, block formats in block_casts.py.
"""

import torch
from torch import Tensor

from runtime.numerics.block_casts import grid_of_blocks
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.grid import GridOverflow, round_to_grid
from runtime.numerics.range_casts import values_in_range
from runtime.numerics.range_formats import get_range_format
from runtime.numerics.scaling import block_lanes, expand_scale, from_lanes
from runtime.numerics.specs import QuantSpec


@torch.no_grad()
def to_grid(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | None,
    *,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: GridOverflow = "saturate",
) -> Tensor:
    """The grid values round_to_grid(x / scale), saturated, the scale not multiplied back: what lp.quantize returns.

    float32 for fp32, fp16 and bf16 x, float64 for float64 x. `scale` is as `compute_scale` shapes it and is trusted to
    be positive and finite. The identity spec returns x itself. overflow="unbounded" rounds as if the exponent had no
    upper end, for those who must know what saturated.
    A range spec gives the values themselves, `scale` and `overflow` not looked at (range_casts.py).
    A block spec gives element * block scale, of nvfp4 times S, `scale` and `overflow` not looked at; element i of the
    stochastic stream is element i of the tensor whose last dim the blocks lie along (`block_lanes`).
    """
    if spec.is_identity:
        return x
    if spec.is_block:
        block, lanes = get_block_format(spec.format), block_lanes(x, spec.along)
        grid = grid_of_blocks(lanes, block, spec.rounding, seed=seed, step=step, stream=stream, offset=offset)
        return from_lanes(grid, x.shape, spec.along)
    if spec.is_range:

        def cast(y: Tensor, integers: QuantSpec, s: Tensor) -> Tensor:
            return to_grid(y, integers, s, seed=seed, step=step, stream=stream, offset=offset)

        return values_in_range(x, get_range_format(spec.format), spec.rounding, cast)
    divisor = None if scale is None else expand_scale(scale, x.shape, spec)
    return round_to_grid(x, get_format(spec.format), spec.rounding, divisor, seed, step, stream, offset, overflow)
