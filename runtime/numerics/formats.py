"""Formats: a number format is a row of facts; everything else about it is derived.

    float  1-E-M, exponent field e, fraction field m:   e >= 1: (-1)^s 2^(e - bias) (1 + m / 2^M)      normal
                                                        e == 0: (-1)^s 2^(1 - bias) (m / 2^M)          subnormal
    int    n in [min, max]
    lookup the value of a code stands in a table

Every value of every float and lookup format is a value of fp32 (checked when the row is made), so fp32 carries them all
exactly. The named rows are FORMATS; others are written

    1-E-M[:bias=B,top=T,subnormals=yes|no]       floats
    intB[:range=full|narrow], uintB[:zero=Z]     integers; narrow, which leaves -2^(B-1) out, is what `intB` means;
                                                 affine: code q stands for q - Z, so that 0 is exact
    pow2[:bits=B,max=K]                          sign, zero and 2^(B-1) - 1 powers of two, the largest 2^K
    dlfloat16:e0=normal|zero                     what exponent field 0 means; normal is what `dlfloat16` means

Formats that share a scale among the elements of a block (mxfp8, nvfp4, ...) are rows of block_formats.py.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from struct import pack, unpack
from typing import Literal, get_args

from runtime.errors import FormatError, NotSupported, nearest_names

Top = Literal["ieee", "nan", "none", "merged", "fnuz"]
DefaultRounding = Literal["nearest_even", "nearest_away"]


@lru_cache(maxsize=4096)
def get_format(name: str) -> "Format":
    """The format called `name`: a row of FORMATS, or one parsed from what the head of this file lists.

    `1-E-M` alone is IEEE-like: bias 2^(E-1) - 1, top exponent kept for Inf and NaN, subnormals, nearest-even.
    So `1-6-9` is not DLFloat: that is the row `dlfloat16`, without subnormals, with one merged top code, ties away.
    Raises FormatError for a name that is no format, NotSupported for a block format: it has no values of its own.
    """
    if name in FORMATS or name in _ALIASES:
        return FORMATS[_ALIASES.get(name, name)]
    if not isinstance(name, str):
        raise FormatError("a format is given by its name", expected='text such as "e4m3"', got=repr(name))
    base, colon, text = name.partition(":")
    if base in BLOCK_NAMES:
        raise NotSupported(
            f'format "{name}" is a block format: it is for the operands of a GEMM and for quantize()',
            hint=f"one of {', '.join(FORMATS)}",
        )
    options = text.split(",") if colon else []
    keys = [option.partition("=")[0] for option in options]
    if len(set(keys)) < len(keys):
        raise FormatError(f'"{name}": an option stands twice', expected="each option once", got=text)
    if matched := re.fullmatch(r"(u?)int([1-9][0-9]*)", base):
        return _parse_integer(name, int(matched[2]), not matched[1], options)
    if matched := re.fullmatch(r"1-([1-9][0-9]*)-(0|[1-9][0-9]*)", base):
        return _parse_float(name, int(matched[1]), int(matched[2]), options)
    if base == "pow2":
        return _parse_pow2(name, options)
    if base == "dlfloat16":
        return _parse_dlfloat(name, options)
    raise FormatError(
        f'"{name}" is not a number format',
        expected="a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]`, `intB` or `uintB`",
        hint=nearest_names(name, (*FORMATS, *BLOCK_NAMES)),
    )


@lru_cache(maxsize=4096)
def embeds(inner: "Format | str", outer: "Format | str") -> bool:
    """True if every finite value of `inner` is a value of `outer`; the sign of zero is not looked at.

    float in float: M_i <= M_o, max_i <= max_o, and the bottom fits: with subnormals in `outer` its quantum divides that
    of `inner`, 2^(emin_o - M_o) <= 2^(emin_i - M_i); without, tiny_o <= tiny_i.
    int in float: all integers up to max_i are values, so max_i <= 2^(M_o + 1), max_i <= max_o and 1 is a value.
    lookup: value by value.
    """
    inner = get_format(inner) if isinstance(inner, str) else inner
    outer = get_format(outer) if isinstance(outer, str) else outer
    if isinstance(inner, LookupFormat) or isinstance(outer, LookupFormat):
        if isinstance(outer, LookupFormat) and inner.codes > outer.codes + 1:  # + 1: inner may have a -0 more
            return False
        return all(has_value(outer, value) for value in finite_values(inner))
    if isinstance(outer, IntFormat):
        if isinstance(inner, FloatFormat) and inner.quantum < 1:
            return False
        return outer.min <= inner.min and inner.max <= outer.max
    if isinstance(inner, IntFormat):
        magnitude = max(inner.max, -inner.min)
        return magnitude <= min(2.0 ** (outer.mantissa + 1), outer.max) and outer.tiny <= 1
    bottom_fits = outer.quantum <= inner.quantum if outer.subnormals else outer.tiny <= inner.tiny
    return inner.mantissa <= outer.mantissa and inner.max <= outer.max and bottom_fits


def has_value(row: "Format", value: float) -> bool:
    """True if the finite `value` is one of the row's; the sign of zero is not looked at."""
    if isinstance(row, LookupFormat):
        return value in row.grid
    if not row.min <= value <= row.max or 0 < abs(value) < row.tiny:
        return False
    if isinstance(row, IntFormat):
        return value.is_integer()
    exponent = max(math.frexp(value)[1] - 1, row.emin)
    return value == 0 or (value * 2.0 ** (row.mantissa - exponent)).is_integer()


@lru_cache(maxsize=64)
def finite_values(row: "Format") -> tuple[float, ...]:
    """Every finite value in increasing order, zero once; for rows of up to 16 bits."""
    if row.bits > 16:
        raise FormatError(f"{row.name} has too many values to list", expected="up to 16 bits", got=f"{row.bits} bits")
    if isinstance(row, LookupFormat):
        return row.grid
    if isinstance(row, IntFormat):
        return tuple(float(n) for n in range(int(row.min), int(row.max) + 1))
    steps = range(2**row.mantissa)
    normal = (2.0**k * (1 + m * row.ulp_at_one) for k in range(row.emin, row.emax + 1) for m in steps)
    positive = {m * row.quantum for m in steps[1:] if row.subnormals}
    positive.update(value for value in normal if row.min_normal <= value <= row.max)
    return tuple(sorted({0.0} | positive | {-value for value in positive}))


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
    merged: the same code, standing for NaN and Inf alike. none: all finite, so the format has neither Inf nor NaN.
    fnuz: all finite, and the code of -0 is the one NaN, so that there is no -0."""
    subnormals: bool = True
    """Whether e = 0 holds subnormals. If not, e = 0 is zero (m != 0 is unused), unless `zero_exponent_is_normal`."""
    zero_exponent_is_normal: bool = False
    """e = 0 is one more binade, 2^-bias (1 + m / 2^M) for m != 0; only e = 0, m = 0 is zero. Excludes subnormals."""
    rounding: DefaultRounding = "nearest_even"
    """The rounding a bare format name means."""
    source: str = ""
    """Where the row comes from."""

    def __post_init__(self) -> None:
        bits = max(2, min(self.exponent, 8)), max(0, min(self.mantissa, 23))
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
        return self.top != "fnuz"

    @property
    def has_nan(self) -> bool:
        """Whether some code means NaN."""
        return self.top != "none"

    @property
    def emin(self) -> int:
        """Exponent of the lowest normal binade."""
        return -self.bias if self.zero_exponent_is_normal else 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value."""
        gone = self.top == "ieee" or (self.top in ("nan", "merged") and self.mantissa == 0)
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
    def first_tie(self) -> float:
        """The tie between 0 and the smallest value: halfway, or with `zero_exponent_is_normal` half a spacing below
        that value, since the code before it, of 2^emin, is the code of zero."""
        return self.min_normal - self.quantum / 2 if self.zero_exponent_is_normal else self.tiny / 2

    @property
    def codes(self) -> int:
        """Number of codes with a finite value, +0 and -0 both counted."""
        per_binade = 2**self.mantissa
        reserved = {"ieee": per_binade, "nan": 1, "merged": 1, "none": 0, "fnuz": 0}[self.top]
        unused = 0 if self.subnormals or self.zero_exponent_is_normal else per_binade - 1
        return int(2 * (2**self.exponent * per_binade - reserved - unused)) - (self.top == "fnuz")

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


def _parse_float(name: str, exponent: int, mantissa: int, options: list[str]) -> FloatFormat:
    """`1-E-M:bias=B,top=T,subnormals=yes|no` with the exponent and mantissa already read."""
    bias, top, subnormals = 2 ** (min(exponent, 16) - 1) - 1 if exponent else 0, "ieee", True
    for option in options:
        key, _, value = option.partition("=")
        if key == "bias" and re.fullmatch(r"-?[0-9]+", value):
            bias = int(value)
        elif key == "top" and value in get_args(Top):
            top = value
        elif key == "subnormals" and value in ("yes", "no"):
            subnormals = value == "yes"
        else:
            raise _not_an_option(name, option, f"bias=INTEGER, top={'|'.join(get_args(Top))} or subnormals=yes|no")
    return FloatFormat(name, exponent, mantissa, bias, top, subnormals, source="written as 1-E-M")  # type: ignore[arg-type]


def _parse_integer(name: str, bits: int, signed: bool, options: list[str]) -> "Format":
    """`intB:range=full|narrow` and `uintB:zero=Z`; int1 is a row."""
    narrow, zero = signed, 0
    for option in options:
        if signed and option in ("range=full", "range=narrow"):
            narrow = option == "range=narrow"
        elif not signed and (matched := re.fullmatch(r"zero=([0-9]+)", option)):
            zero = int(matched[1])
        else:
            raise _not_an_option(name, option, "range=full or range=narrow" if signed else "zero=CODE")
    if signed and bits == 1:
        raise FormatError(f'"{name}": int1 is -1 and 1, and has no range to choose', hint="int1")
    return IntFormat(name, bits, signed, narrow, zero, source="written as " + ("intB" if signed else "uintB"))


def _parse_pow2(name: str, options: list[str]) -> FloatFormat:
    """`pow2:bits=B,max=K`: exponent fields 1 to 2^(B-1) - 1, the last one 2^K; field 0 is zero."""
    bits, largest = 4, None
    for option in options:
        key, _, value = option.partition("=")
        if key == "bits" and re.fullmatch(r"[3-9]", value):
            bits = int(value)
        elif key == "max" and re.fullmatch(r"-?[0-9]+", value):
            largest = int(value)
        else:
            raise _not_an_option(name, option, "bits=3 to 9 or max=INTEGER")
    exponent = bits - 1
    last = 2 ** (exponent - 1) - 1 if largest is None else largest
    bias = 2**exponent - 1 - last
    return FloatFormat(name, exponent, 0, bias, "none", subnormals=False, source="powers of two and zero")


def _parse_dlfloat(name: str, options: list[str]) -> FloatFormat:
    row, is_normal = FORMATS["dlfloat16"], True
    assert isinstance(row, FloatFormat)
    for option in options:
        if option not in ("e0=normal", "e0=zero"):
            raise _not_an_option(name, option, "e0=normal or e0=zero")
        is_normal = option == "e0=normal"
    return replace(row, name=name, zero_exponent_is_normal=is_normal)


def _not_an_option(name: str, option: str, expected: str) -> FormatError:
    return FormatError(f'"{name}": "{option}" is not a format option', expected=expected, got=option or "nothing")


def _radix4(unit: float) -> tuple[float, ...]:
    """Sign and three exponent bits: e = 0 is zero, e >= 1 is unit * 4^(e - 4)."""
    magnitudes = (0.0, *(unit * 4.0 ** (e - 4) for e in range(1, 8)))
    return magnitudes + tuple(-value for value in magnitudes)


# Quantiles of a normal distribution, scaled to [-1, 1]: with o = 0.9677083, ppf(linspace(o, 1/2, 9)[:-1]) above zero,
# -ppf(linspace(o, 1/2, 8)[:-1]) below, over the largest; in fp32.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = "Sun et al., Ultra-Low Precision 4-bit Training, NeurIPS 2020"
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
        FloatFormat("e4m3-fnuz", 4, 3, 8, top="fnuz", source="Noune et al., arXiv 2206.02915; AMD MI300"),
        FloatFormat("e5m2-fnuz", 5, 2, 16, top="fnuz", source="Noune et al., arXiv 2206.02915; AMD MI300"),
        FloatFormat("e4m3-ieee", 4, 3, 7, source="IEEE 754-2019 rules for 1-4-3; not the OCP e4m3"),
        FloatFormat("pow2", 3, 0, 4, top="none", subnormals=False, source="1-3-0 in radix 2; e = 0 is zero"),
        LookupFormat(
            "fp4-radix4",
            _radix4(1.0),
            beyond=256.0,
            rounding="nearest_away",
            layout="1-3-0, radix 4",
            source=f"{_FP4}; the even phase of its two-phase rounding",
        ),
        LookupFormat(
            "fp4-radix4-odd",
            _radix4(0.5),
            beyond=128.0,
            rounding="nearest_away",
            layout="1-3-0, radix 4, halved",
            source=f"{_FP4}; the odd phase, odd(x) = even(2 x) / 2",
        ),
        LookupFormat("nf4", _NF4, source="Dettmers et al., QLoRA, arXiv 2305.14314, appendix E"),
        LookupFormat(
            "e8m0",
            (*(2.0 ** (e - 127) for e in range(255)), math.nan),
            beyond=2.0**128,
            layout="0-8-0",
            source="OCP Microscaling Formats v1.0, section 5.4.1; a scale: no sign, no zero",
        ),
        LookupFormat("int1", (1.0, -1.0), layout="sign", source="Rastegari et al., XNOR-Net; binary; sign(0) = +1"),
        IntFormat("ternary", 2, source="the values of int2: -1, 0, 1"),
        IntFormat("int2", 2, source="symmetric: -1, 0, 1"),
        IntFormat("int4", 4, source="symmetric: -7 to 7"),
        IntFormat("int8", 8, source="symmetric: -127 to 127"),
        IntFormat("int16", 16, source="symmetric"),
        IntFormat("int32", 32, source="symmetric; the accumulator of integer GEMMs"),
        IntFormat("uint4", 4, signed=False, source="unsigned: 0 to 15"),
        IntFormat("uint8", 8, signed=False, source="unsigned: 0 to 255"),
    )
}

_ALIASES = {"binary": "int1"}

BLOCK_NAMES = ("mxfp8", "mxfp8-e5m2", "mxfp6", "mxfp6-e3m2", "mxfp4", "mxint8", "nvfp4")
"""The rows of block_formats.py, which needs this file and not the other way round."""
