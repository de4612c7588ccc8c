"""The three kinds of formats: the facts of a row, and what is derived from them.

    float  1-E-M, exponent field e, fraction field m:   e >= 1: (-1)^s 2^(e - bias) (1 + m / 2^M)      normal
                                                        e == 0: (-1)^s 2^(1 - bias) (m / 2^M)          subnormal
    int    n in [min, max]
    lookup the value of a code stands in a table

Every value of every float and lookup format is a value of fp32 (checked when the row is made), so fp32 carries them all
exactly.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from struct import pack, unpack
from typing import Literal, get_args

from runtime.errors import FormatError

Top = Literal["ieee", "nan", "none", "merged", "fnuz", "p3109"]
_LAST_CODE = ("nan", "merged", "p3109")
"""Tops that take one code of each sign, the last, from the finite ones."""
DefaultRounding = Literal["nearest_even", "nearest_away"]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format, one sign bit, `exponent` bits, `mantissa` bits.

    Invariants: 1 <= exponent <= 8 (2 for top ieee), 0 <= mantissa <= 23, and every finite value is an fp32 value.
    """

    name: str
    """How policies and reports write it."""
    exponent: int
    """Bits of the exponent field."""
    mantissa: int
    """Bits of the fraction field, the leading one not counted."""
    bias: int
    """Value of the exponent field of 1.0."""
    top: Top = "ieee"
    """The codes with all exponent bits set. ieee: Inf (m = 0) and NaN. nan: finite but the all-ones code, which is NaN.
    merged: the same code, standing for NaN and Inf alike. none: all finite, so the format has neither Inf nor NaN.
    fnuz: all finite, and the code of -0 is the one NaN, so that there is no -0. p3109: fnuz, but the all-ones code is
    Inf."""
    subnormals: bool = True
    """Whether e = 0 holds subnormals. If not, e = 0 is zero (m != 0 is unused), unless `zero_exponent_is_normal`."""
    zero_exponent_is_normal: bool = False
    """e = 0 is one more binade, 2^-bias (1 + m / 2^M) for m != 0; only e = 0, m = 0 is zero. Excludes subnormals."""
    rounding: DefaultRounding = "nearest_even"
    """The rounding a bare format name means."""
    source: str = ""
    """Where the row comes from."""

    def __post_init__(self) -> None:
        least = 1 if self.top in ("fnuz", "p3109") else 2
        bits = max(least, min(self.exponent, 8)), max(0, min(self.mantissa, 23))
        if bits != (self.exponent, self.mantissa):
            raise FormatError(
                f'"{self.name}" is not a float format this version has',
                expected="2 to 8 exponent bits and 0 to 23 mantissa bits, those of fp32, which carries every value",
                got=f"{self.exponent} and {self.mantissa}",
                hint=f'"1-{bits[0]}-{bits[1]}"? It is the nearest',
            )
        rules = [
            (self.top in get_args(Top), f"top one of {', '.join(get_args(Top))}"),
            (
                self.top != "ieee" or self.mantissa >= 1,
                "a mantissa bit to tell Inf from NaN; or top=none, pow2",
            ),
            (not (self.subnormals and self.zero_exponent_is_normal), "e = 0 either subnormal or normal"),
            (self.mantissa >= 1 or not self.zero_exponent_is_normal, "a mantissa bit to tell e = 0 from zero"),
        ]
        for holds, rule in rules:
            if not holds:
                raise FormatError(f'"{self.name}" is not a float format this version has', expected=rule)
        if self.emin - self.mantissa < -149 or self.emax > 127:
            raise FormatError(
                f'"{self.name}" has values that fp32 does not',
                expected="all values in [2^-149, 2^128)",
                got=f"exponents {self.emin - self.mantissa} to {self.emax}",
            )

    @property
    def bits(self) -> int:
        """Bits of a code: sign, exponent, mantissa."""
        return 1 + self.exponent + self.mantissa

    @property
    def signed(self) -> bool:
        """Always: one sign bit."""
        return True

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 is a value of its own."""
        return self.top not in ("fnuz", "p3109")

    @property
    def has_nan(self) -> bool:
        """Whether some code means NaN."""
        return self.top != "none"

    @property
    def has_infinity(self) -> bool:
        """Whether some code means Inf and no other does."""
        return self.top in ("ieee", "p3109")

    @property
    def emin(self) -> int:
        """Exponent of the lowest normal binade."""
        return -self.bias if self.zero_exponent_is_normal else 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value."""
        gone = self.top == "ieee" or (self.top in _LAST_CODE and self.mantissa == 0)
        return 2**self.exponent - 1 - self.bias - gone

    @property
    def max(self) -> float:
        """Largest finite value."""
        steps_below_two = 2 if self.top in _LAST_CODE and self.mantissa else 1
        return 2.0**self.emax * (2 - steps_below_two * self.ulp_at_one)

    @property
    def min(self) -> float:
        """Most negative finite value, -max."""
        return -self.max

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value; with `zero_exponent_is_normal` 2^emin itself is the code of zero."""
        return 2.0**self.emin * (1 + (self.ulp_at_one if self.zero_exponent_is_normal else 0))

    @property
    def tiny(self) -> float:
        """Smallest positive value."""
        return self.quantum if self.subnormals else self.min_normal

    @property
    def quantum(self) -> float:
        """Spacing in the lowest binade, 2^(emin - M): every value is a multiple of it."""
        return 2.0 ** (self.emin - self.mantissa)

    @property
    def first_tie(self) -> float:
        """The tie between 0 and the smallest value: halfway, or with `zero_exponent_is_normal` half a spacing below
        that value, since the code before it, of 2^emin, is the code of zero."""
        return self.min_normal - self.quantum / 2 if self.zero_exponent_is_normal else self.tiny / 2

    @property
    def codes(self) -> int:
        """Number of codes with a finite value, +0 and -0 both counted."""
        per_binade = 2**self.mantissa
        reserved = {"ieee": per_binade, "nan": 1, "merged": 1, "none": 0, "fnuz": 0, "p3109": 1}[self.top]
        unused = 0 if self.subnormals or self.zero_exponent_is_normal else per_binade - 1
        return int(2 * (2**self.exponent * per_binade - reserved - unused)) - (not self.has_negative_zero)

    @property
    def ulp_at_one(self) -> float:
        """Spacing of the values in [1, 2): 2^-M."""
        return 2.0**-self.mantissa


@dataclass(frozen=True)
class IntFormat:
    """A signed or unsigned integer format; the value is the integer, a scale comes from outside."""

    name: str
    """How policies and reports write it."""
    bits: int
    """Bits of a code, the sign counted."""
    signed: bool = True
    """Two's complement, or unsigned."""
    narrow: bool = True
    """Signed only: leave out -2^(bits-1), so that the range is symmetric and negation never overflows."""
    zero: int = 0
    """Unsigned only: the zero point of an affine quantizer, the code that stands for 0. A value is code - zero."""
    rounding: DefaultRounding = "nearest_even"
    """The rounding a bare format name means."""
    source: str = ""
    """Where the row comes from."""

    def __post_init__(self) -> None:
        if not 1 + self.signed <= self.bits <= 32:
            raise FormatError(
                f'"{self.name}" is not an integer format this version has', expected=f"{1 + self.signed} to 32 bits"
            )
        if self.zero and not (not self.signed and 0 < self.zero < 2**self.bits - 1):
            raise FormatError(
                f'"{self.name}" has no such zero point',
                expected="unsigned, and 0 <= zero < 2^bits - 1",
                got=str(self.zero),
            )

    @property
    def has_negative_zero(self) -> bool:
        """Never."""
        return False

    @property
    def has_nan(self) -> bool:
        """Never."""
        return False

    @property
    def max(self) -> float:
        """Largest value."""
        return 2.0 ** (self.bits - self.signed) - 1 - self.zero

    @property
    def min(self) -> float:
        """Smallest value."""
        return float(-self.zero) if not self.signed else -self.max - (not self.narrow)

    @property
    def tiny(self) -> float:
        """Smallest positive value: one step."""
        return 1.0

    @property
    def codes(self) -> int:
        """Number of values."""
        return int(self.max - self.min) + 1


@dataclass(frozen=True)
class LookupFormat:
    """A format whose values stand in a table: values[code].

    Invariants: 2^bits values, all of fp32, finite or NaN, no finite one twice but +0 and -0.
    """

    name: str
    """How policies and reports write it."""
    values: tuple[float, ...]
    """The value of each code; NaN for a code that means NaN."""
    beyond: float | None = None
    """What would follow the largest value if the table went on: overflow is judged after rounding, and this is what an
    overflow rounds to. None: as far from the largest value as that is from the one before."""
    fills: float | None = None
    """Where a scale puts the largest magnitude. None: on the largest value, so that nothing saturates."""
    rounding: DefaultRounding = "nearest_even"
    """The rounding a bare format name means."""
    layout: str = "table"
    """What the codes are made of, for the table of formats."""
    source: str = ""
    """Where the row comes from."""

    def __post_init__(self) -> None:
        finite = [value for value in self.values if not math.isnan(value)]
        rules = [
            (len(self.values) == 2**self.bits, "2^bits values"),
            (all(abs(v) < 2.0**128 and unpack("f", pack("f", v))[0] == v for v in finite), "values of fp32"),
            (len(set(finite)) == len(finite) - self.has_negative_zero >= 2, "two different values or more"),
        ]
        for holds, rule in rules:
            if not holds:
                raise FormatError(f'"{self.name}" is not a lookup format', expected=rule)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """The finite values in increasing order, zero once."""
        return tuple(sorted({value + 0.0 for value in self.values if not math.isnan(value)}))

    @cached_property
    def beyond_max(self) -> float:
        """`beyond`, or the last gap once more."""
        return 2 * self.grid[-1] - self.grid[-2] if self.beyond is None else self.beyond

    @property
    def signed(self) -> bool:
        """Whether there are negative values."""
        return self.grid[0] < 0

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 is a value of its own."""
        return any(value == 0 and math.copysign(1, value) < 0 for value in self.values)

    @property
    def has_nan(self) -> bool:
        """Whether some code means NaN."""
        return any(math.isnan(value) for value in self.values)

    @property
    def max(self) -> float:
        """Largest value."""
        return self.grid[-1]

    @property
    def min(self) -> float:
        """Smallest value."""
        return self.grid[0]

    @property
    def tiny(self) -> float:
        """Smallest positive value."""
        return min(value for value in self.grid if value > 0)

    @property
    def codes(self) -> int:
        """Number of codes with a finite value, +0 and -0 both counted."""
        return sum(not math.isnan(value) for value in self.values)


Format = FloatFormat | IntFormat | LookupFormat


def filled_to(row: Format) -> float:
    """Where a scale puts the largest magnitude of what is cast."""
    return row.fills if isinstance(row, LookupFormat) and row.fills is not None else row.max
