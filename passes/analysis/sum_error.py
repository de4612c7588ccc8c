"""Sum error: what the roundings of a sum cost beside the casts of its operands, for random products of mean 0.

With r = c 2^-m the relative error of one rounding to m mantissa bits (rms; c is near 0.21, and divides out), a sum of n
products, whose partial sums s_i have variance i, has

    casts        r_l^2 + r_r^2 of its variance
    nearest      sum of r^2 i over i up to n, over n: r^2 (n + 1) / 2
    stochastic   twice that: the error of one rounding is uniform over a whole spacing and not over half of one
    toward zero  every rounding takes a share g = 0.36 2^-m of |s_i|, all one way: an error of g n / sqrt 3 of its
                 standard deviation, and a sum that keeps (1 - e^(-2 g n)) / (2 g n) of its variance
    ties away    a quarter to half of that error, the other way, where products are so short that many roundings are
                 ties: where they have at most m + 2 bits; else nearest

A sum in chunks has the roundings of both levels, rounded products are one rounding more, and under per_chunk, whose
chunks are summed in fp32, a chunk is rounded once. So a sum costs no more than its casts from

    nearest      m = log2(sqrt(roundings) / e)      e = sqrt(4^-m_l + 4^-m_r)
    toward zero  m = log2(roundings / e) + 1        a bit more, since such errors do not average out
    ties away    m = log2(roundings / e) - 1

An aligned sum cuts its terms to F fraction bits of the largest, which is the running sum: an error of 1.4 r sqrt n of
its standard deviation with r = c 2^-F, whatever the chunk. Where the accumulator has fewer bits, M < F, each chunk also
is a rounding toward zero to M of them; where it has as many, they hold nearly all that was added.

    aligned      F = log2(1.4 sqrt n / e)           M = log2(chunks / e) + 1, or F if that is less

The shares are measured against emulated sums by tests/passes/analysis/test_sum_error.py.
"""

import math

from runtime.numerics.block_formats import get_block_format, is_block_format
from runtime.numerics.format_kinds import FloatFormat, IntFormat
from runtime.numerics.formats import get_format
from runtime.numerics.range_formats import get_range_format, is_range_format
from runtime.numerics.specs import AccumulateSpec, GemmSpec

_SHARE_CUT = 0.36
_SHARE_ALIGNED = 1.4
_FP32_BITS = 23


def bits_for_casts(gemm: GemmSpec, n: int, nonzero: float = 1.0) -> int:
    """The fewest mantissa bits m >= 1, up to fp32's, with which the roundings of a sum of n products cost no more than
    the casts of its operands do; the format of the accumulator is not looked at.
    """
    error = math.hypot(*(2.0 ** -mantissa_of(operand.format) for operand in (gemm.lhs, gemm.rhs)))
    levels, how = _levels(gemm.accumulator, n, nonzero), gemm.accumulator
    is_rounded = how.product == "rounded"
    one_way = math.log2((sum(levels) + is_rounded) / error)
    roundings = sum((level + 1) / 2 for level in levels) + is_rounded
    bits = math.log2(math.sqrt(roundings * (2 if how.rounding == "stochastic" else 1)) / error)
    if _rounding_of(how) == "toward_zero":
        bits = one_way + 1
    elif _rounding_of(how) == "nearest_away" and not is_rounded:
        product_bits = sum(mantissa_of(operand.format) for operand in (gemm.lhs, gemm.rhs)) + 1
        bits = bits if bits < product_bits - 2 else max(bits, one_way - 1)
    return min(max(1, math.ceil(bits)), _FP32_BITS)


def aligned_bits_for_casts(gemm: GemmSpec, n: int) -> tuple[int, int]:
    """(F, M) of an aligned sum: the fewest fraction bits of its terms, and of an accumulator that has fewer than these,
    with which a sum of n products costs no more than the casts of its operands do.
    """
    error = math.hypot(*(2.0 ** -mantissa_of(operand.format) for operand in (gemm.lhs, gemm.rhs)))
    chunks = math.ceil(n / (gemm.accumulator.chunk or n))
    align = max(1, math.ceil(math.log2(_SHARE_ALIGNED * math.sqrt(n) / error)))
    return align, max(1, math.ceil(math.log2(chunks / error) + 1))


def kept_toward_zero(m: int, how: AccumulateSpec, n: int, nonzero: float = 1.0) -> float:
    """The share of its variance that a sum of n products keeps where all roundings go toward zero."""
    lost = [2 * _SHARE_CUT * 2.0**-m * level for level in _levels(how, n, nonzero)]
    return math.prod(-math.expm1(-each) / each for each in lost)


def mantissa_of(format: str) -> float:
    """m of a cast to a format: of a float its mantissa bits; values that are evenly spaced, or a table, under a scale
    of amax have 3 bits less than they have in all, as most numbers are a quarter of the largest or so.
    """
    if is_range_format(format):
        return get_range_format(format).bits - 3
    row = get_format(get_block_format(format).element if is_block_format(format) else format)
    if isinstance(row, FloatFormat):
        return row.mantissa
    return math.log2(row.max - row.min if isinstance(row, IntFormat) else row.codes) - 3


def _levels(how: AccumulateSpec, n: int, nonzero: float) -> list[int]:
    """How many roundings one after another each level of the sum has."""
    size = min(how.chunk or n, n)
    chunks = math.ceil(n / size)
    inner = 1 if how.model == "per_chunk" else max(1, round(nonzero * size))
    return [inner, chunks] if chunks > 1 else [inner]


def _rounding_of(how: AccumulateSpec) -> str:
    return how.rounding or "nearest" if how.is_open else how.mode
