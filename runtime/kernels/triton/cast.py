"""Cast on a GPU: the loop of runtime/kernels/cpu/cast.cpp in Triton, bit for bit; that file explains the arithmetic.

Only `runtime.kernels.cast` imports this module, and only once it has a CUDA tensor to cast: it imports triton. What
must hold of the compiled code for the bits to agree: fp32 division is rounded to nearest (`div_rn`; plain `/` is not),
additions keep subnormals (Triton's default), and no product is fused into a sum (`enable_fp_fusion=False`).
"""

import torch
import triton  # type: ignore[import-untyped]  # noqa: TID251 - this package is the one place
import triton.language as tl  # type: ignore[import-untyped]  # noqa: TID251
from torch import Tensor

from runtime.kernels.cpu.cast_library import CastPlan
from runtime.kernels.triton.rounding import held_in, loaded, rounded, words_of
from runtime.numerics.random import signed_seed

BLOCK = 1024
_NO_SCALE, _ONE_SCALE, _TILES = range(3)


def launch_cast(
    x: Tensor, scale: Tensor | None, plan: CastPlan, dtype: torch.dtype, tile: tuple[int, int],
    draw: tuple[int, int, int, int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grid values of contiguous x in `dtype`, bool () whether one rounded out of range or was NaN), on x's device.

    scale: contiguous fp32, one per `tile` (rows, columns) of x's matrix view. draw: (seed, step, stream, offset) if the
    rounding is stochastic. `dtype` holds every value of the format.
    """
    out, beyond = torch.empty_like(x, dtype=dtype), torch.zeros((), dtype=torch.int32, device=x.device)
    columns = x.shape[-1] if x.dim() else 1
    seed, step, stream, offset = draw or (0, 0, 0, 0)
    skip = offset % 4  # a program begins at a whole Philox counter
    scaled = _NO_SCALE if scale is None else _ONE_SCALE if scale.numel() == 1 else _TILES
    is_long = x.numel() + 2 * BLOCK >= 2**31
    if x.numel():
        _cast[(triton.cdiv(x.numel() + skip, BLOCK),)](
            x, out, beyond, x if scale is None else scale,
            x.numel(), columns, *tile, -(-columns // tile[1]),
            *signed_draw(seed, step, stream), offset // 4, skip,
            plan.low, plan.magic, plan.spacing, plan.up_at, plan.down_below, plan.min, plan.max, plan.zero,
            SHIFT=plan.shift, BIAS=plan.round_bias, ODD=plan.odd_mask, SCALED=scaled, STOCHASTIC=draw is not None,
            INDEX=tl.int64 if is_long else tl.int32, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out, beyond != 0


def signed_draw(seed: int, step: int, stream: int) -> tuple[int, int, int, int]:
    """Seed, what is added to the high half of the counter, step, low half of the stream, as kernels take them."""
    return signed_seed(seed), _signed(stream >> 32 << 16), _signed(step), _signed(stream)


def _signed(word: int) -> int:
    """The low 32 bits as int32, so that an argument has one type whatever its value."""
    return (word + 2**31) % 2**32 - 2**31


@triton.jit(do_not_specialize=["seed", "high", "step", "stream", "first", "skip"])
def _cast(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, beyond_ptr, scale_ptr, count, columns, tile_rows, tile_columns, tiles,
    seed, high, step, stream, first, skip,
    low, magic, spacing, up_at, down_below, least, largest, zero,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, ODD: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(INDEX)
    at = program * BLOCK + tl.arange(0, BLOCK) - skip
    inside = (at >= 0) & (at < count)
    y = loaded(x_ptr + at, inside)
    if SCALED == 1:
        y = tl.div_rn(y, tl.load(scale_ptr) + tl.zeros_like(y))
    if SCALED == 2:
        tile = at // columns // tile_rows * tiles + at % columns // tile_columns
        y = tl.div_rn(y, tl.load(scale_ptr + tile, mask=inside, other=1.0))
    word = tl.zeros([BLOCK], tl.uint32)
    if STOCHASTIC:
        n = first.to(tl.int64) + program.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        c0, c1, c2, c3 = words_of(n, seed, high, step, stream)
        word = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [BLOCK])
    q = rounded(y, word, low, magic, spacing, up_at, down_below, SHIFT, BIAS, ODD, STOCHASTIC)
    least, largest = tl.full((), least, tl.float32), tl.full((), largest, tl.float32)
    is_beyond = inside & ((q != q) | (q > largest) | (q < least))
    tl.store(beyond_ptr, 1, mask=tl.max(is_beyond.to(tl.int32), axis=0) > 0)
    held = tl.where(q > largest, largest, tl.where(q < least, least, q)) + tl.full((), zero, tl.float32)
    tl.store(out_ptr + at, held_in(held, out_ptr.dtype.element_ty), mask=inside)
