"""The parts that the casts of this folder share: how they load, draw, round and store. Arithmetic as in cast.cpp.

The interpreter hands scalar floats over as Python's, which would widen what they meet to float64: each is made fp32.
"""

import triton  # type: ignore[import-untyped]  # noqa: TID251 - this package is the one place
import triton.language as tl  # type: ignore[import-untyped]  # noqa: TID251


@triton.jit
def loaded(pointer, inside):  # type: ignore[no-untyped-def]
    """fp32 values, 0 where not `inside`; bf16 by its bits, as the interpreter's own conversion loses subnormals."""
    x = tl.load(pointer, mask=inside, other=0.0)
    if pointer.dtype.element_ty == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def words_of(n, seed, high, step, stream):  # type: ignore[no-untyped-def]
    """The four Philox words of counters n (int64), as runtime/numerics/random.py lays them out."""
    return tl.philox(
        seed.to(tl.int64),
        n.to(tl.uint32),
        (n >> 32).to(tl.uint32) + high.to(tl.uint32),
        tl.zeros_like(n).to(tl.uint32) + step.to(tl.uint32),
        tl.zeros_like(n).to(tl.uint32) + stream.to(tl.uint32),
    )


@triton.jit
def rounded(  # type: ignore[no-untyped-def]
    y, word, low, magic, spacing, up_at, down_below,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, ODD: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """fp32 y rounded by the constants of a CastPlan, not saturated; NaN for NaN. word: 32 random bits each."""
    low, magic, spacing = tl.full((), low, tl.float32), tl.full((), magic, tl.float32), tl.full((), spacing, tl.float32)
    up_at, down_below = tl.full((), up_at, tl.float32), tl.full((), down_below, tl.float32)
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.to(tl.float32, bitcast=True)
    if STOCHASTIC:
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
    result = tl.where(a < low, lower, upper).to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return tl.where(y != y, y, result.to(tl.float32, bitcast=True))


@triton.jit
def held_in(value, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 values that `dtype` has, in it; a NaN stays one, whatever its payload."""
    if dtype == tl.bfloat16:
        top = (value.to(tl.uint32, bitcast=True) | tl.where(value != value, 0x400000, 0).to(tl.uint32)) >> 16
        return top.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)
