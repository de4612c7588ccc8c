"""Grid: round a tensor to the values of a scalar format - the oracle, written for the reader, in float64.

For a magnitude a = |x / scale| in a float format with lowest exponent emin and M fraction bits:

    k = max(floor(log2 a), emin)      the binade of a
    ulp = 2^(k - M)                   the spacing there; 1 for an integer format
    q = min(round(a / ulp) ulp, max)  rounded on that spacing (carrying into the next binade is automatic), saturated

Everything up to `round` is exact in float64. A format without subnormals has nothing between 0 and its smallest value:
there ulp is that value. (In dlfloat16 the code below the smallest value is that of zero, so the nearest roundings give
0 up to half a spacing below that value.) A lookup format has no spacing. Between two neighbours in its table:

    nearest_even   the nearer by value; a tie goes to 0 if 0 is one of the two, else to the larger magnitude
    nearest_away   the nearer by value; a tie goes to the larger magnitude
    toward_zero    the one of smaller magnitude; FormatError for int1, where there is nothing toward zero of 0.3
    stochastic     the one of larger magnitude with probability (|x| - |near|) / (|far| - |near|)

No entry of a table is even or odd, so a tie is decided as IEEE 754-2019, 4.3.1, decides it for one significant digit:
the larger in magnitude. Between -1 and +1 of int1 a tie goes to +1, and stochastic gives +1 with probability
(x + 1) / 2. The quotient that stochastic compares with its 32 random bits is rounded to float64 there.

The sign is put back at the end, so -0 and a negative that rounds to zero give -0 in a format that has -0, else +0.
NaN stays NaN.
"""

from typing import Literal

import torch
from torch import Tensor

from runtime.errors import FormatError, nearest_names
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat
from runtime.numerics.random import random_bits
from runtime.numerics.rounding import goes_far, round_to_integer
from runtime.numerics.scaling import power_of_two
from runtime.numerics.specs import ROUNDINGS, Rounding

GridOverflow = Literal["saturate", "ieee", "unbounded"]


@torch.no_grad()
def round_to_grid(
    x: Tensor,
    row: Format,
    rounding: Rounding,
    scale: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: GridOverflow = "saturate",
) -> Tensor:
    """round(x / scale) on the grid of `row`: float32, or float64 for float64 x; the division is done in that dtype."""
    if not x.is_floating_point():
        raise FormatError("only real numbers are quantized", expected="a floating-point tensor", got=str(x.dtype))
    if rounding not in ROUNDINGS:
        raise FormatError(f'"{rounding}" is not a rounding', hint=nearest_names(rounding, ROUNDINGS))
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(working) if scale is None else x.to(working) / scale.to(working)
    wide = y.double()
    u = None
    if rounding == "stochastic":
        words = random_bits(x.numel(), seed=seed, step=step, stream=stream, offset=offset, device=x.device)
        u = (words.double() * 2.0**-32).reshape(x.shape)
    if isinstance(row, LookupFormat):
        q = _look_up(wide, row, rounding, u)
    else:
        a = wide.abs()
        ulp = _spacing(a, row)
        # Exact, ulp being a power of two, except for a below a smallest value that is none (dlfloat16). That one's tie
        # is not its half, and is compared with; the quotient serves the other roundings.
        size = round_to_integer(a / ulp, rounding, u) * ulp
        if (
            isinstance(row, FloatFormat)
            and row.zero_exponent_is_normal
            and rounding in ("nearest_even", "nearest_away")
        ):
            is_up = a >= row.first_tie if rounding == "nearest_away" else a > row.first_tie
            size = torch.where(a < row.tiny, torch.where(is_up, row.tiny, 0.0), size)
        q = torch.copysign(size, wide)
    if overflow != "unbounded":
        low, high = int_range(row, working) if isinstance(row, IntFormat) else (row.min, row.max)
        top = meaning_of_overflow(row) if overflow == "ieee" else None
        beyond = q.clamp(low, high) if top is None else torch.copysign(torch.full_like(q, top), wide)
        if top is not None and rounding == "toward_zero":  # IEEE 754-2019, 7.4: only what is infinite stays so
            beyond = torch.where(wide.isinf(), beyond, q.clamp(low, high))
        q = torch.where((q < low) | (q > high), beyond, q)
    if not row.has_negative_zero:
        q = q + 0.0  # -0 + 0 is 0
    return torch.where(wide.isnan(), wide, q).to(working)


def neighbours(x: float, row: Format) -> tuple[float | None, float | None]:
    """The largest value of `row` not above x and the smallest not below; None where there is none. Equal on the grid.

    Integers beyond 2^53 apart from their range are not looked at: x is a float64.
    """
    if isinstance(row, LookupFormat):
        below, above = [v for v in row.grid if v <= x], [v for v in row.grid if v >= x]
        return (below[-1] if below else None), (above[0] if above else None)
    if not row.min <= x <= row.max:
        return (row.max, None) if x > row.max else (None, row.min)
    a = torch.tensor(abs(x), dtype=torch.float64, device="cpu")
    ulp = _spacing(a, row)
    near, far = (float(torch.floor(a / ulp) * ulp), float(torch.ceil(a / ulp) * ulp))
    low, high = (near, far) if x >= 0 else (-far, -near)
    return (low if low >= row.min else None), (high if high <= row.max else None)


def binade(a: Tensor, emin: int) -> Tensor:
    """max(floor(log2 a), emin) as int32; emin for 0, Inf and NaN."""
    _, exponent = torch.frexp(torch.where(a.isfinite(), a, 0.0))  # a = f 2^exponent, 1/2 <= f < 1; exponent 0 for a = 0
    return torch.where(a > 0, exponent - 1, emin).clamp(min=emin)


def int_range(row: IntFormat, working: torch.dtype) -> tuple[float, float]:
    """(min, max), in fp32 moved inward to the nearest fp32: int32 ends at 2^31 - 128 there."""
    high = row.max
    if working == torch.float32 and high > 2**24:
        high += 1 - 2.0 ** (row.bits - row.signed - 24)
    return (-high if row.signed and row.narrow else row.min), high


def _spacing(a: Tensor, row: FloatFormat | IntFormat) -> Tensor:
    """The distance of the two grid values around a >= 0, in float64."""
    if not isinstance(row, FloatFormat):
        return torch.ones_like(a)
    ulp = power_of_two(binade(a, row.emin) - row.mantissa)
    return ulp if row.subnormals else torch.where(a < row.tiny, row.tiny, ulp)


def meaning_of_overflow(row: Format) -> float | None:
    """What overflow="ieee" gives: Inf, NaN, or None for a format that has neither and saturates all the same."""
    if isinstance(row, FloatFormat) and row.has_infinity:
        return torch.inf
    return torch.nan if row.has_nan else None


def _look_up(x: Tensor, row: LookupFormat, rounding: Rounding, u: Tensor | None) -> Tensor:
    """Round on the table, continued by one value past each end so that the caller sees what overflows.

    A table of positive values alone (e8m0) is not continued below: x > 0 goes up to the smallest, x <= 0 stays x.
    """
    if rounding == "toward_zero" and row.signed and 0.0 not in row.grid:
        raise FormatError(f"{row.name} has no value between its smallest two and zero", hint="another rounding")
    below_min = -row.beyond_max if row.min == -row.max else 2 * row.grid[0] - row.grid[1]
    table = torch.tensor(
        (*((below_min,) if row.signed else ()), *row.grid, row.beyond_max), dtype=torch.float64, device=x.device
    )
    inside = torch.where(x.isnan(), 0.0, x).clamp(table[0], table[-1])
    index = (torch.searchsorted(table, inside, right=True) - 1).clamp(0, len(table) - 2)
    below, above = table[index], table[index + 1]
    # `near` is the smaller in magnitude; of int1, -1.
    mirrored = above <= 0
    near, far = torch.where(mirrored, above, below), torch.where(mirrored, below, above)
    q = torch.where(goes_far(near, far, inside, rounding, u), far, near)
    if not row.signed and row.min > 0:
        q = torch.where(x <= 0, x, q)
    return torch.where(q == 0, torch.copysign(q, x), q)
