"""Block cast on a GPU: the values of runtime/numerics/block_casts.py, bit for bit, the blocks along the last dim.

One pass for MX: amax of a block, its scale, its elements, by one program. nvfp4 takes a first pass for the divisor of
the whole tensor, which stays on the device. The order of fp32 operations is that of `scale_blocks` and `cast_block` in
runtime/kernels/cpu/cast.cpp; what must hold of the compiled code is said in cast.py beside this.
"""

import torch
import triton  # type: ignore[import-untyped]  # noqa: TID251 - this package is the one place
import triton.language as tl  # type: ignore[import-untyped]  # noqa: TID251
from torch import Tensor

from runtime.kernels.cpu.cast_library import BlockPlan
from runtime.kernels.triton.cast import signed_draw
from runtime.kernels.triton.rounding import held_in, loaded, rounded, words_of
from runtime.numerics.block_formats import BLOCK_RULES

ELEMENTS = 1024
"""That one program casts."""


def launch_block_cast(
    x: Tensor, plan: BlockPlan, divisor: Tensor, is_divided: bool, dtype: torch.dtype,
    draw: tuple[int, int, int, int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(values of contiguous x in `dtype`, uint8 (): 1 if a block holds NaN or Inf, plus 2 if a value may be too fine
    for bf16), on x's device.

    divisor: S of nvfp4, fp32, (), on x's device; not read for MX. draw: (seed, step, stream, offset) if the rounding is
    stochastic.
    """
    out, said = torch.empty_like(x, dtype=dtype), torch.zeros(2, dtype=torch.int32, device=x.device)
    columns = x.shape[-1] if x.dim() else 1
    block = plan.block
    per_row = -(-columns // block)
    count = x.numel() // max(columns, 1) * per_row
    seed, step, stream, offset = draw or (0, 0, 0, 0)
    p, scale = plan.element, plan.scale
    if x.numel():
        _cast_blocks[(triton.cdiv(count, ELEMENTS // block),)](
            x, out, said, divisor, count, columns, per_row,
            *signed_draw(seed, step, stream), offset,
            p.low, p.magic, p.spacing, p.up_at, p.down_below, p.min, p.max, p.zero, plan.unit, 1.0 / plan.unit,
            plan.max / 2.0**plan.exponent, plan.round_from, plan.exponent, plan.bf16_from, plan.per_max,
            scale.low, scale.magic, scale.spacing, scale.up_at, scale.down_below, scale.max,
            SHIFT=p.shift, BIAS=p.round_bias, ODD=p.odd_mask, SCALE_SHIFT=scale.shift, SCALE_BIAS=scale.round_bias,
            SCALE_ODD=scale.odd_mask, RULE=BLOCK_RULES[plan.rule], DIVIDED=is_divided, STOCHASTIC=draw is not None,
            INDEX=tl.int64 if x.numel() + 2 * ELEMENTS >= 2**31 else tl.int32,
            BLOCK=block, BLOCKS=ELEMENTS // block, enable_fp_fusion=False,
        )  # fmt: skip
    return out, (said[0] + 2 * said[1]).to(torch.uint8)


def launch_finite_amax(x: Tensor, block: int) -> Tensor:
    """max |x|, fp32, (), of contiguous x over the blocks of its last dim that hold neither NaN nor Inf."""
    top = torch.zeros((), dtype=torch.int32, device=x.device)
    columns = x.shape[-1] if x.dim() else 1
    per_row = -(-columns // block)
    count = x.numel() // max(columns, 1) * per_row
    if x.numel():
        _finite_amax[(triton.cdiv(count, ELEMENTS // block),)](
            x, top, count, columns, per_row, INDEX=tl.int64 if x.numel() + 2 * ELEMENTS >= 2**31 else tl.int32,
            BLOCK=block, BLOCKS=ELEMENTS // block,
        )  # fmt: skip
    return top.view(torch.float32)


@triton.jit
def _finite_amax(  # type: ignore[no-untyped-def]
    x_ptr, top_ptr, count, columns, per_row, INDEX: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(INDEX) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % per_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    at = (block // per_row * columns)[:, None] + column
    x = loaded(x_ptr + at, (block < count)[:, None] & (column < columns))
    top = tl.max((x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), axis=1)
    tl.atomic_max(top_ptr, tl.max(tl.where(top < 0x7F800000, top, 0), axis=0))  # of IEEE patterns, exact in any order


@triton.jit(do_not_specialize=["seed", "high", "step", "stream", "offset"])
def _cast_blocks(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, said_ptr, divisor_ptr, count, columns, per_row,
    seed, high, step, stream, offset,
    low, magic, spacing, up_at, down_below, least, largest, zero, unit, per_unit,
    max_significand, round_from, exponent, bf16_from, per_max,
    scale_low, scale_magic, scale_spacing, scale_up_at, scale_down_below, scale_largest,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, ODD: tl.constexpr, SCALE_SHIFT: tl.constexpr, SCALE_BIAS: tl.constexpr,
    SCALE_ODD: tl.constexpr, RULE: tl.constexpr, DIVIDED: tl.constexpr, STOCHASTIC: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(INDEX) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % per_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    at = (block // per_row * columns)[:, None] + column
    inside = (block < count)[:, None] & (column < columns)
    x = loaded(x_ptr + at, inside)
    magnitude = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    top = tl.max(magnitude, axis=1)  # in the order of magnitudes, NaN above Inf
    amax = top.to(tl.float32, bitcast=True)
    is_bad = top >= 0x7F800000
    if RULE == "two_level":
        divisor = tl.load(divisor_ptr)
        up, one = divisor * tl.full((), per_max, tl.float32), tl.full((), 1.0, tl.float32)
        down = tl.div_rn(one, divisor)
        scale = rounded(
            amax * up, tl.zeros_like(top).to(tl.uint32), scale_low, scale_magic, scale_spacing, scale_up_at,
            scale_down_below, SCALE_SHIFT, SCALE_BIAS, SCALE_ODD, False,
        )  # fmt: skip
        scale_largest = tl.full((), scale_largest, tl.float32)
        scale = tl.where(scale > scale_largest, scale_largest, scale)
        factor = tl.div_rn(tl.zeros_like(scale) + one, scale * down)
        greatest = tl.full((), 3.4028234663852886e38, tl.float32)
        factor = tl.where(factor > greatest, greatest, factor)
    else:
        is_tiny = top < 0x00800000
        bits = tl.where(is_tiny, amax * tl.full((), 16777216.0, tl.float32), amax).to(tl.uint32, bitcast=True)  # 2^24
        fraction = bits & 0x7FFFFF
        significand = (fraction | 0x3F800000).to(tl.float32, bitcast=True)
        k = (bits >> 23).to(tl.int32) - 127 - tl.where(is_tiny, 24, 0) - exponent
        if RULE == "ceil":
            k += tl.where(fraction != 0, 1, 0)
        if RULE == "rceil":
            k += tl.where(significand > tl.full((), max_significand, tl.float32), 1, 0)
        if RULE == "even":
            k += tl.where(significand >= tl.full((), round_from, tl.float32), 1, 0)
        k = tl.where(top == 0, -127, tl.where(is_bad, 0, tl.minimum(tl.maximum(k, -127), 127)))
        scale = tl.where(k >= -126, (k + 127) << 23, 1 << 22).to(tl.float32, bitcast=True)
        factor = tl.where(k <= 126, (127 - k) << 23, 1 << 22).to(tl.float32, bitcast=True)
        is_fine = (block < count) & (top > 0) & (k < bf16_from)
        tl.store(said_ptr + 1, 1, mask=tl.max(is_fine.to(tl.int32), axis=0) > 0)
    tl.store(said_ptr, 1, mask=tl.max(((block < count) & is_bad).to(tl.int32), axis=0) > 0)
    unit, per_unit = tl.full((), unit, tl.float32), tl.full((), per_unit, tl.float32)
    y = x * factor[:, None] * per_unit
    word = tl.zeros([BLOCKS, BLOCK], tl.uint32)
    if STOCHASTIC:
        place = offset.to(tl.int64) + at.to(tl.int64)
        c0, c1, c2, c3 = words_of(place >> 2, seed, high, step, stream)
        one_of = place & 3
        word = tl.where(one_of < 2, tl.where(one_of == 0, c0, c1), tl.where(one_of == 2, c2, c3))
    q = rounded(y, word, low, magic, spacing, up_at, down_below, SHIFT, BIAS, ODD, STOCHASTIC)
    least, largest = tl.full((), least, tl.float32), tl.full((), largest, tl.float32)
    q = tl.where(q > largest, largest, tl.where(q < least, least, q)) + tl.full((), zero, tl.float32)
    value = q * unit * scale[:, None]
    if DIVIDED:
        value = tl.div_rn(value, tl.zeros_like(value) + tl.load(divisor_ptr))
    value = tl.where(is_bad[:, None], float("nan"), value)
    tl.store(out_ptr + at, held_in(value, out_ptr.dtype.element_ty), mask=inside)
