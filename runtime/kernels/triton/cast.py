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
from runtime.kernels.cpu.philox import signed_seed

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
            signed_seed(seed), offset // 4, skip, _signed(stream >> 32 << 16), _signed(step), _signed(stream),
            plan.low, plan.magic, plan.spacing, plan.up_at, plan.down_below, plan.min, plan.max, plan.zero,
            SHIFT=plan.shift, BIAS=plan.round_bias, ODD=plan.odd_mask, SCALED=scaled, STOCHASTIC=draw is not None,
            INDEX=tl.int64 if is_long else tl.int32, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out, beyond != 0


def _signed(word: int) -> int:
    """The low 32 bits as int32, so that an argument has one type whatever its value."""
    return (word + 2**31) % 2**32 - 2**31


@triton.jit(do_not_specialize=["seed", "first", "skip", "high", "step", "stream"])
def _cast(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, beyond_ptr, scale_ptr, count, columns, tile_rows, tile_columns, tiles,
    seed, first, skip, high, step, stream,
    low, magic, spacing, up_at, down_below, least, largest, zero,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, ODD: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr,
    INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(INDEX)
    at = program * BLOCK + tl.arange(0, BLOCK) - skip
    inside = (at >= 0) & (at < count)
    y = tl.load(x_ptr + at, mask=inside, other=0.0)
    if x_ptr.dtype.element_ty == tl.bfloat16:  # by its bits, as the interpreter's own conversion loses subnormals
        y = (y.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = y.to(tl.float32)
    if SCALED == 1:
        y = tl.div_rn(y, tl.load(scale_ptr) + tl.zeros_like(y))
    if SCALED == 2:
        tile = at // columns // tile_rows * tiles + at % columns // tile_columns
        y = tl.div_rn(y, tl.load(scale_ptr + tile, mask=inside, other=1.0))
    # The interpreter hands floats over as Python's, which would widen what they meet to float64.
    low, magic, spacing = tl.full((), low, tl.float32), tl.full((), magic, tl.float32), tl.full((), spacing, tl.float32)
    up_at, down_below = tl.full((), up_at, tl.float32), tl.full((), down_below, tl.float32)
    least, largest = tl.full((), least, tl.float32), tl.full((), largest, tl.float32)
    zero = tl.full((), zero, tl.float32)
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.to(tl.float32, bitcast=True)
    if STOCHASTIC:
        n = first.to(tl.int64) + program.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        c0, c1, c2, c3 = tl.philox(
            seed.to(tl.int64),
            n.to(tl.uint32),
            (n >> 32).to(tl.uint32) + high.to(tl.uint32),
            tl.zeros_like(n).to(tl.uint32) + step.to(tl.uint32),
            tl.zeros_like(n).to(tl.uint32) + stream.to(tl.uint32),
        )
        word = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [BLOCK])
        raised = magnitude
        if SHIFT > 0:
            raised = magnitude + (word >> (32 - SHIFT))
        wide = spacing.to(tl.float64)
        t = tl.where(a < low, a, low).to(tl.float64) / wide
        below = tl.floor(t)
        chance = 1.0 - word.to(tl.float64) * 2.3283064365386963e-10  # 2^-32
        lower = ((below + tl.where(t - below >= chance, 1.0, 0.0)) * wide).to(tl.float32)
    else:
        raised = magnitude + BIAS + ((magnitude >> SHIFT) & ODD)
        nearest = (a + magic) - magic
        d = a - nearest
        lower = nearest + tl.where(d >= up_at, spacing, 0.0) - tl.where(d < down_below, spacing, 0.0)
    upper = ((raised >> SHIFT) << SHIFT).to(tl.float32, bitcast=True)
    rounded = tl.where(a < low, lower, upper).to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    q = tl.where(y != y, y, rounded.to(tl.float32, bitcast=True))
    is_beyond = inside & ((q != q) | (q > largest) | (q < least))
    tl.store(beyond_ptr, 1, mask=tl.max(is_beyond.to(tl.int32), axis=0) > 0)
    held = tl.where(q > largest, largest, tl.where(q < least, least, q)) + zero
    if out_ptr.dtype.element_ty == tl.bfloat16:
        top = (held.to(tl.uint32, bitcast=True) | tl.where(held != held, 0x400000, 0).to(tl.uint32)) >> 16
        tl.store(out_ptr + at, top.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out_ptr + at, held.to(out_ptr.dtype.element_ty), mask=inside)
