"""Block values: what `quantize` gives on a block format, by the fastest path there is.

    lp::quantize_block_values       the same as an op, opaque, for code that is compiled

The op has a fake, and the straight-through gradient of lp::quantize_values. A compiler fuses nothing into it: the scale
of a block is decided by bits of its largest element, for which no compiler here makes vector code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from runtime.kernels.cast.traced import Draw
from runtime.kernels.cast_plans import block_plan
from runtime.kernels.cpu.block_cast import fast_blocks
from runtime.numerics.block_casts import quantize_blocks
from runtime.numerics.block_formats import BlockFormat, get_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.specs import Rounding


def block_values(
    x: Tensor, format: str | BlockFormat, rounding: Rounding | None, draw: Draw, out: Tensor | None = None
) -> Tensor:
    """x on the grid of a block format, in x's dtype, no gradient. rounding None is that of the elements' row.

    `out`: where to write; x fp32, out contiguous, x itself or apart from it. It is not looked at in compiled code.
    """
    if torch.compiler.is_compiling() and isinstance(format, str):
        given = (format, rounding, signed_seed(draw.seed), *draw[1:])
        values: Tensor = torch.ops.lp.quantize_block_values(x.detach(), *given)
        return values
    row = get_block_format(format) if isinstance(format, str) else format
    mode = rounding or get_format(row.element).rounding
    if mode == "stochastic":
        check_counter(*draw[1:])
    fast = fast_blocks(
        x, block_plan(row, mode), is_divided=True, is_stochastic=mode == "stochastic", out=out, **draw._asdict()
    )
    if fast is not None:
        return fast.values if out is not None else fast.values.to(x.dtype)
    values = quantize_blocks(x, row, mode, **draw._asdict())
    return values if out is None else out.copy_(values)


def _block_values(
    x: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int
) -> Tensor:
    values = block_values(x, format, rounding, Draw(seed, step, stream, offset))
    return values.clone() if values is x else values


def _shape(x: Tensor, format: str, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int) -> Tensor:
    get_block_format(format)
    return x.new_empty(x.shape)


def _straight_through(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None, None


_OPS = Library("lp", "FRAGMENT")
_OPS.define(
    "quantize_block_values(Tensor x, str format, str? rounding, int seed, SymInt step, SymInt stream, SymInt offset) "
    "-> Tensor"
)
_OPS.impl("quantize_block_values", _block_values, "CompositeExplicitAutograd")
register_fake("lp::quantize_block_values", _shape, lib=_OPS)
register_autograd("lp::quantize_block_values", _straight_through, lib=_OPS)
