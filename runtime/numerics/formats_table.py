"""The table of formats: docs/formats.md, written from the rows.

python -m runtime.numerics.formats_table > docs/formats.md
"""

from math import frexp

from runtime.numerics.block_formats import BLOCK_FORMATS, BlockFormat
from runtime.numerics.embedding import embeds
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat
from runtime.numerics.formats import FORMATS

COLUMNS = (
    "name",
    "layout",
    "bias",
    "max",
    "min normal",
    "min subnormal",
    "finite codes",
    "ulp at 1",
    "specials",
    "rounding",
    "source",
)
BLOCK_COLUMNS = ("name", "element", "block", "scale", "scale rule", "max element", "bits per value", "source")

_HEAD = """# Number formats

Written from the rows of `runtime/numerics/formats.py` and `block_formats.py`, and compared with them by a test:

    python -m runtime.numerics.formats_table > docs/formats.md

`lpcompile inspect formats` prints the same, `lpcompile inspect value 0.3 --format e4m3,nvfp4` what becomes of a number.

## Scalar formats

The layout is bits of sign-exponent-fraction. Powers of two and integers of up to 10 digits are exact, other numbers
rounded to 7 digits. Finite codes count +0 and -0 both. Rounding is the one that a bare name means; nearest_even,
nearest_away, toward_zero and stochastic work with every format (int1: not toward_zero, it has no 0).
"""
_WRITTEN = """
Also written: `1-E-M[:bias=B,top=ieee|nan|none|merged|fnuz|p3109,subnormals=yes|no]`, `intB[:range=full|narrow]`,
`uintB[:zero=Z]` (affine: code q stands for q - Z), `pow2[:bits=B,max=K]`, `dlfloat16:e0=normal|zero`,
`binaryKpP[se|sf]` (P3109: K bits of which P of precision, 2 or more; signed; e with Inf, which is meant without a
suffix, f without). Exponent field 0 of DLFloat16 is one more binade (normal, the default) or zero.

Specials: `Inf, NaN`: the top exponent, as in IEEE 754. `NaN`: the all-ones code, of either sign. `one NaN/Inf`: the
same code for both. `NaN, no -0`: the code of -0 is NaN.
`Inf, NaN, no -0`: and the all-ones code is Inf. Every format saturates unless `overflow="ieee"` is asked for;
one without a code for an overflow saturates then too. In a table (fp4-radix4, nf4, e8m0, int1) a tie goes under
nearest_even to 0 if that is one of the two, else to the larger magnitude. int1 has no 0: sign(0) = +1, in a row of
zeros too. `subnormals=no` leaves 0 and the smallest normal: what lies between goes to the nearer of them.
"""
_BLOCKS = """
## Block formats

Blocks run along the last dim; the last one may be ragged. An MX format takes `:scale=floor|ceil|rceil|even`.
`quantize()` casts to them, `encode_blocks` and `decode_blocks` of `runtime.numerics` give and take their
codes. As operands of a GEMM their blocks lie along its sum, whichever way that runs.
"""
_EXACT = """
## What sits exactly in what

Yes: every finite value of the row is a value of the column, so a GEMM of the row may run on operands of the column.
"""
_HOSTS = ("int8", "e4m3", "e5m2", "bf16", "fp16", "tf32", "fp32")


def to_markdown() -> str:
    """The whole page."""
    scalars = [scalar_cells(row) for row in FORMATS.values()]
    blocks = [block_cells(row) for row in BLOCK_FORMATS.values()]
    exact = [[name, *("yes" if embeds(name, host) else "" for host in _HOSTS)] for name in FORMATS]
    return "".join((
        _HEAD,
        _table(COLUMNS, scalars),
        _WRITTEN,
        _BLOCKS,
        _table(BLOCK_COLUMNS, blocks),
        _EXACT,
        _table(("", *_HOSTS), exact),
    ))  # fmt: skip


def scalar_cells(row: Format) -> list[str]:
    """One row of the first table, in the order of COLUMNS."""
    bias, normal, subnormal, ulp = "", number(row.tiny), "", ""
    if isinstance(row, FloatFormat):
        bias, normal, ulp = str(row.bias), number(row.min_normal), number(row.ulp_at_one)
        subnormal = number(row.tiny) if row.subnormals and row.mantissa else ""
    elif isinstance(row, IntFormat):
        ulp = "1"
    largest = number(row.max) + ("" if row.min == -row.max else f" (min {number(row.min)})")
    codes, specials = number(row.codes), specials_of(row)
    return [row.name, layout_of(row), bias, largest, normal, subnormal, codes, ulp, specials, row.rounding, row.source]


def block_cells(row: BlockFormat) -> list[str]:
    """One row of the second table, in the order of BLOCK_COLUMNS."""
    element = row.element + (f" * {number(row.element_unit)}" if row.element_unit != 1 else "")
    rule = "amax / 6 under one fp32 scale per tensor" if row.is_two_level else row.rule
    share = f"{row.bits_per_value:g}"
    return [row.name, element, str(row.block), row.scale, rule, number(row.element_max), share, row.source]


def layout_of(row: Format) -> str:
    """What the bits are."""
    if isinstance(row, FloatFormat):
        return f"1-{row.exponent}-{row.mantissa}"
    if isinstance(row, LookupFormat):
        return row.layout
    return f"{row.bits} bits, " + ("two's complement" if row.signed else "unsigned")


def specials_of(row: Format) -> str:
    """Codes that are no finite number."""
    if isinstance(row, FloatFormat):
        names = {"ieee": "Inf, NaN", "nan": "NaN", "merged": "one NaN/Inf", "none": "none", "fnuz": "NaN, no -0"}
        names["p3109"] = "Inf, NaN, no -0"
        return names[row.top]
    return "NaN" if row.has_nan else "none"


def number(value: float) -> str:
    """An integer of up to 10 digits or a power of two exactly, else 7 digits."""
    if value == int(value) and abs(value) < 10**10:
        return str(int(value))
    if frexp(abs(value))[0] == 0.5:
        return ("-" if value < 0 else "") + f"2^{frexp(abs(value))[1] - 1}"
    return f"{value:.7g}"


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(to_markdown(), end="")
