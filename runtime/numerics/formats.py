"""Formats: a number format is a row of facts; everything else about it is derived (format_kinds.py).

The named rows are FORMATS; others are written

    1-E-M[:bias=B,top=T,subnormals=yes|no]       floats
    intB[:range=full|narrow], uintB[:zero=Z]     integers; narrow, which leaves -2^(B-1) out, is what `intB` means;
                                                 affine: code q stands for q - Z, so that 0 is exact
    pow2[:bits=B,max=K]                          sign, zero and 2^(B-1) - 1 powers of two, the largest 2^K
    binaryKpP[se|sf]                             P3109: K bits, P of precision, signed, with Inf (e) or without (f)
    dlfloat16:e0=normal|zero                     what exponent field 0 means; normal is what `dlfloat16` means

Formats that share a scale among the elements of a block (mxfp8, nvfp4, ...) are rows of block_formats.py;
those that follow the range of what is cast (psq5) are in range_formats.py.
"""

import math
import re
from dataclasses import replace
from functools import lru_cache
from typing import get_args

from runtime.errors import FormatError, LpError, NotSupported, nearest_names
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat, Top
from runtime.numerics.range_formats import is_range_format


@lru_cache(maxsize=4096)
def get_format(name: str) -> Format:
    """The format called `name`: a row of FORMATS, or one parsed from what the head of this file lists.

    `1-E-M` alone is IEEE-like: bias 2^(E-1) - 1, top exponent kept for Inf and NaN, subnormals, nearest-even.
    So `1-6-9` is not DLFloat: that is the row `dlfloat16`, without subnormals, with one merged top code, ties away.
    Raises FormatError for a name that is no format, NotSupported for a block format: it has no values of its own.
    """
    if name in FORMATS or name in _ALIASES:
        return FORMATS[_ALIASES.get(name, name)]
    if name in _GIVEN:
        return _GIVEN[name]
    if not isinstance(name, str):
        raise FormatError("a format is given by its name", expected='text such as "e4m3"', got=repr(name))
    from runtime.numerics.block_formats import BLOCK_FORMATS  # here: their rows name rows of this file

    base, colon, text = name.partition(":")
    if base in BLOCK_FORMATS:
        raise NotSupported(
            f'format "{name}" is a block format: it is for the operands of a GEMM and for quantize()',
            hint=f"one of {', '.join(FORMATS)}",
        )
    if is_range_format(name):
        what = f'format "{name}" is a range format: it is for the operands of a GEMM and for quantize()'
        raise NotSupported(what, hint=f"one of {', '.join(FORMATS)}")
    options = text.split(",") if colon else []
    keys = [option.partition("=")[0] for option in options]
    if len(set(keys)) < len(keys):
        raise FormatError(f'"{name}": an option stands twice', expected="each option once", got=text)
    if matched := re.fullmatch(r"(u?)int([1-9][0-9]*)", base):
        return _parse_integer(name, int(matched[2]), not matched[1], options)
    if matched := re.fullmatch(r"1-([1-9][0-9]*)-(0|[1-9][0-9]*)", base):
        return _parse_float(name, int(matched[1]), int(matched[2]), options)
    if matched := re.fullmatch(r"binary([1-9][0-9]*)p([1-9][0-9]*)(|se|sf|ue|uf)", name):
        return _parse_p3109(name, int(matched[1]), int(matched[2]), matched[3])
    if base == "pow2":
        return _parse_pow2(name, options)
    if base == "dlfloat16":
        return _parse_dlfloat(name, options)
    raise FormatError(
        f'"{name}" is not a number format',
        expected="a name of the table, `1-E-M[:bias=B,top=T,subnormals=yes|no]`, `intB` or `uintB`",
        hint=nearest_names(name, (*FORMATS, *BLOCK_FORMATS)),
    )


@lru_cache(maxsize=4096)
def name_of(row: Format) -> str:
    """A name under which get_format gives this row: its own, or one made for this process."""
    try:
        if get_format(row.name) == row:
            return row.name
    except LpError:
        pass
    made = f"{row.name}:row={len(_GIVEN)}"
    _GIVEN[made] = row
    return made


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


def _parse_integer(name: str, bits: int, signed: bool, options: list[str]) -> Format:
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


def _parse_p3109(name: str, bits: int, precision: int, suffix: str) -> Format:
    """`binaryKpP[se|sf]`; se is what no suffix means."""
    if suffix == "se":
        return get_format(name.removesuffix("se"))
    if suffix.startswith("u"):
        raise NotSupported(f'"{name}" is unsigned', where="P3109", hint=f"the signed binary{bits}p{precision}")
    if precision == 1:
        # Its ties go to the even code, and between two powers of two this system's go to the larger.
        raise NotSupported(f'"{name}" has no fraction bits', where="P3109", hint=f"1-{bits - 1}-0:top=p3109")
    if not precision < bits:
        raise FormatError(f'"{name}" is not a P3109 format', expected="1 < P < K, for signed ones", got=name)
    return _p3109(name, bits, precision, "fnuz" if suffix == "sf" else "p3109")


def _p3109(name: str, bits: int, precision: int, top: Top = "p3109") -> FloatFormat:
    exponent = bits - precision
    bias = 2 ** max(0, min(exponent, 16) - 1)
    return FloatFormat(name, exponent, precision - 1, bias, top, source=_P3109)


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


def _luq() -> tuple[float, ...]:
    """Zero and 1, 2, 4, 8, 16 of each sign; the two codes above mean nothing."""
    magnitudes = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    nothing = (math.nan, math.nan)
    return (*magnitudes, *nothing, *(-value for value in magnitudes), *nothing)


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
_P3109 = "IEEE P3109 working group, draft formats for machine learning"
_OCP_MX = "OCP Microscaling Formats v1.0, section 5.3"

_ROWS: tuple[Format, ...] = (
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
    *(_p3109(f"binary8p{precision}", 8, precision) for precision in range(2, 8)),
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
        fills=64.0,
        rounding="nearest_away",
        layout="1-3-0, radix 4, halved",
        source=f"{_FP4}; the odd phase, odd(x) = even(2 x) / 2, under the scale of the even one",
    ),
    LookupFormat(
        "fp4-luq",
        _luq(),
        beyond=32.0,
        layout="1-3-0, radix 2",
        source="Chmiel et al., LUQ, arXiv 2112.10769: the largest is 16 times the smallest; 4 of 16 codes are not used",
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
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}

_ALIASES = {"binary": "int1"}
_GIVEN: dict[str, Format] = {}
"""Rows that somebody made, by the name that they got here."""
