"""Formats: a number format is a row of facts; everything else about it is derived.

    float  1-E-M, exponent field e, fraction field m:   e >= 1: (-1)^s 2^(e - bias) (1 + m / 2^M)      normal
                                                        e == 0: (-1)^s 2^(1 - bias) (m / 2^M)          subnormal
    int    n in [min, max]

Every value of every float format is a value of fp32 (checked when the row is made), so fp32 carries them all exactly.
The named rows are FORMATS: other floats are written `1-E-M[:bias=B,top=T,subnormals=yes|no]`, integers `intB`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from runtime.errors import FormatError, NotSupported, nearest_names

Top = Literal["ieee", "nan", "none", "merged"]
DefaultRounding = Literal["nearest_even", "nearest_away"]


@lru_cache(maxsize=4096)
def get_format(name: str) -> "Format":
    """The format called `name`: a row of FORMATS, or one parsed from `1-E-M[:option,...]` or `intB`.

    `1-E-M` alone is IEEE-like: bias 2^(E-1) - 1, top exponent kept for Inf and NaN, subnormals, nearest-even.
    So `1-6-9` is not DLFloat: that is the row `dlfloat16`, without subnormals, with one merged top code, ties away.
    Raises FormatError for a name that is no format, NotSupported for one that is planned.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name in PLANNED or name.startswith("uint"):
        raise NotSupported(f'format "{name}" is planned and not in this version', hint=f"one of {', '.join(FORMATS)}")
    if matched := re.fullmatch(r"int(\d+)", name):
        return IntFormat(name, int(matched[1]))
    if matched := re.fullmatch(r"1-(\d+)-(\d+)(?::(.*))?", name):
        return _parse_float(name, int(matched[1]), int(matched[2]), matched[3])
    raise FormatError(
        f'"{name}" is not a number format',
        expected="a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]` or `intB`",
        hint=nearest_names(name, tuple(FORMATS)),
    )


@lru_cache(maxsize=4096)
def embeds(inner: "Format | str", outer: "Format | str") -> bool:
    """True if every finite value of `inner` is a value of `outer`; the sign of zero is not looked at.

    float in float: M_i <= M_o, max_i <= max_o, and the bottom fits: with subnormals in `outer` its quantum divides that
    of `inner`, 2^(emin_o - M_o) <= 2^(emin_i - M_i); without, tiny_o <= tiny_i.
    int in float: all integers up to max_i are values, so max_i <= 2^(M_o + 1), max_i <= max_o and 1 is a value.
    """
    inner = get_format(inner) if isinstance(inner, str) else inner
    outer = get_format(outer) if isinstance(outer, str) else outer
    if isinstance(outer, IntFormat):
        if isinstance(inner, FloatFormat) and inner.quantum < 1:
            return False
        return outer.min <= (inner.min if isinstance(inner, IntFormat) else -inner.max) and inner.max <= outer.max
    if isinstance(inner, IntFormat):
        magnitude = max(inner.max, -inner.min)
        return magnitude <= min(2.0 ** (outer.mantissa + 1), outer.max) and outer.tiny <= 1
    bottom_fits = outer.quantum <= inner.quantum if outer.subnormals else outer.tiny <= inner.tiny
    return inner.mantissa <= outer.mantissa and inner.max <= outer.max and bottom_fits


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format, one sign bit, `exponent` bits, `mantissa` bits.

    Invariants: 2 <= exponent <= 8, 0 <= mantissa <= 23, and every finite value is an fp32 value.
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
    merged: the same code, standing for NaN and Inf alike. none: all finite, so the format has neither Inf nor NaN."""
    subnormals: bool = True
    """Whether e = 0 holds subnormals. If not, e = 0 is zero (m != 0 is unused), unless `zero_exponent_is_normal`."""
    zero_exponent_is_normal: bool = False
    """e = 0 is one more binade, 2^-bias (1 + m / 2^M) for m != 0; only e = 0, m = 0 is zero. Excludes subnormals."""
    rounding: DefaultRounding = "nearest_even"
    """The rounding a bare format name means."""
    source: str = ""
    """Where the row comes from."""

    def __post_init__(self) -> None:
        rules = [
            (2 <= self.exponent <= 8, "2 to 8 exponent bits"),
            (0 <= self.mantissa <= 23, "0 to 23 mantissa bits"),
            (self.top in get_args(Top), f"top one of {', '.join(get_args(Top))}"),
            (self.top != "ieee" or self.mantissa >= 1, "a mantissa bit to tell Inf from NaN; or top=nan, top=none"),
            (not (self.subnormals and self.zero_exponent_is_normal), "e = 0 either subnormal or normal"),
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
        """Always: one sign bit, and a zero of either sign."""
        return True

    @property
    def emin(self) -> int:
        """Exponent of the lowest normal binade."""
        return -self.bias if self.zero_exponent_is_normal else 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value."""
        gone = self.top == "ieee" or (self.top != "none" and self.mantissa == 0)
        return 2**self.exponent - 1 - self.bias - gone

    @property
    def max(self) -> float:
        """Largest finite value."""
        steps_below_two = 2 if self.top in ("nan", "merged") and self.mantissa else 1
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
    def codes(self) -> int:
        """Number of codes with a finite value, +0 and -0 both counted."""
        per_binade = 2**self.mantissa
        reserved = {"ieee": per_binade, "nan": 1, "merged": 1, "none": 0}[self.top]
        unused = 0 if self.subnormals or self.zero_exponent_is_normal else per_binade - 1
        return int(2 * (2**self.exponent * per_binade - reserved - unused))

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
    rounding: DefaultRounding = "nearest_even"
    """The rounding a bare format name means."""
    source: str = ""
    """Where the row comes from."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 32:
            raise FormatError(f'"{self.name}" is not an integer format this version has', expected="2 to 32 bits")

    @property
    def max(self) -> float:
        """Largest value."""
        return 2.0 ** (self.bits - self.signed) - 1

    @property
    def min(self) -> float:
        """Smallest value."""
        return 0.0 if not self.signed else -self.max - (not self.narrow)

    @property
    def tiny(self) -> float:
        """Smallest positive value: one step."""
        return 1.0

    @property
    def codes(self) -> int:
        """Number of values."""
        return int(self.max - self.min) + 1


Format = FloatFormat | IntFormat


def _parse_float(name: str, exponent: int, mantissa: int, options: str | None) -> FloatFormat:
    """`1-E-M:bias=B,top=T,subnormals=yes|no` with the exponent and mantissa already read."""
    bias, top, subnormals = 2 ** (min(exponent, 16) - 1) - 1 if exponent else 0, "ieee", True
    for option in options.split(",") if options is not None else ():
        key, _, value = option.partition("=")
        if key == "bias" and re.fullmatch(r"-?\d+", value):
            bias = int(value)
        elif key == "top" and value in get_args(Top):
            top = value
        elif key == "subnormals" and value in ("yes", "no"):
            subnormals = value == "yes"
        else:
            raise FormatError(
                f'"{name}": "{option}" is not a format option',
                expected="bias=INTEGER, top=ieee|nan|none|merged or subnormals=yes|no",
                got=option or "nothing",
            )
    return FloatFormat(name, exponent, mantissa, bias, top, subnormals, source="written as 1-E-M")  # type: ignore[arg-type]


_OCP_FP8 = "OCP 8-bit Floating Point Specification v1.0, table 1"
_OCP_MX = "OCP Microscaling Formats v1.0, section 5.3"

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        FloatFormat("fp32", 8, 23, 127, source="IEEE 754-2019 binary32"),
        FloatFormat("tf32", 8, 10, 127, source="NVIDIA A100 whitepaper; 19 bits"),
        FloatFormat("fp16", 5, 10, 15, source="IEEE 754-2019 binary16"),
        FloatFormat("bf16", 8, 7, 127, source="Kalamkar et al., arXiv 1905.12322; with subnormals"),
        FloatFormat(
            "dlfloat16",
            6,
            9,
            31,
            top="merged",
            subnormals=False,
            zero_exponent_is_normal=True,
            rounding="nearest_away",
            source="Agrawal et al., DLFloat, ARITH 2019; top code and e = 0 as in onnx-mlir's NNPA limits",
        ),
        FloatFormat("e4m3", 4, 3, 7, top="nan", source=f"{_OCP_FP8}; also called e4m3fn"),
        FloatFormat("e5m2", 5, 2, 15, source=_OCP_FP8),
        # Whether the paper reserves the top exponent is not known. Reserved here, as in every later 1-5-2: max 57344,
        # not 114688.
        FloatFormat("fp8-152", 5, 2, 15, source="Wang et al., NeurIPS 2018, with IEEE-style specials"),
        FloatFormat("hfp8-143", 4, 3, 11, top="none", source="Sun et al., NeurIPS 2019: bias 7 + 4, nothing reserved"),
        FloatFormat("e3m2", 3, 2, 3, top="none", source=_OCP_MX),
        FloatFormat("e2m3", 2, 3, 1, top="none", source=_OCP_MX),
        FloatFormat("e2m1", 2, 1, 1, top="none", source=_OCP_MX),
        IntFormat("int2", 2, source="symmetric: -1, 0, 1"),
        IntFormat("int4", 4, source="symmetric: -7 to 7"),
        IntFormat("int8", 8, source="symmetric: -127 to 127"),
        IntFormat("int16", 16, source="symmetric"),
        IntFormat("int32", 32, source="symmetric; the accumulator of integer GEMMs"),
    )
}

PLANNED = ("e8m0", "fp4-radix4", "pow2", "nf4", "mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4", "int1", "1-3-0")
