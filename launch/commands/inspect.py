"""`lpcompile inspect`: the number formats there are, and what one number becomes in them.

Errors are LpError and go up to the command line, which prints them as one sentence.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime.errors import FormatError, nearest_names
from runtime.numerics import decode, encode, encode_blocks, quantize
from runtime.numerics.block_formats import BLOCK_FORMATS, BlockFormat, get_block_format, is_block_format
from runtime.numerics.format_kinds import FloatFormat, Format
from runtime.numerics.formats import FORMATS, get_format
from runtime.numerics.formats_table import BLOCK_COLUMNS, COLUMNS, block_cells, number, scalar_cells
from runtime.numerics.grid import neighbours, round_to_grid
from runtime.numerics.specs import ROUNDINGS, Rounding

inspect_app = typer.Typer(no_args_is_help=True, help="Number formats: what there is, and what a number becomes.")

_SOME = "fp16,bf16,dlfloat16,e4m3,e5m2,mxfp4,nvfp4"


@inspect_app.command("formats", epilog="Example: lpcompile inspect formats")
def formats() -> None:
    """The number formats by name: range, codes, specials, default rounding, source."""
    scalars = Table(*COLUMNS, box=None, header_style="bold")
    for row in FORMATS.values():
        scalars.add_row(*map(escape, scalar_cells(row)))
    blocks = Table(*BLOCK_COLUMNS, box=None, header_style="bold")
    for block in BLOCK_FORMATS.values():
        blocks.add_row(*map(escape, block_cells(block)))
    console = _console()
    console.print(scalars)
    console.print("\nalso written: 1-E-M[:option,...], intB, uintB, pow2:bits=B; see docs/formats.md\n", markup=False)
    console.print(blocks)


@inspect_app.command(
    "value",
    epilog="Examples: lpcompile inspect value 0.3 --format e4m3,dlfloat16,nvfp4  |  lpcompile inspect value -2^-10 "
    "--format e4m3 --rounding nearest_away",
    context_settings={"ignore_unknown_options": True},
)
def value(
    x: Annotated[str, typer.Argument(metavar="NUMBER", help="As 0.3, -1e-6, 2^-10, 1/3, 0x1.8p3, inf or nan.")],
    format: Annotated[
        list[str] | None, typer.Option(help=f"Names, with commas or repeated (default: {_SOME}).")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(metavar=f"[{'|'.join(ROUNDINGS)}]", help="Instead of each format's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of stochastic rounding.")] = 0,
) -> None:
    """One number in some formats: code, value, error, the values below and above, ties and overflow.

    The number is taken as a float64. In a block format it is a tensor of one element, which its scale is made for.
    """
    if rounding is not None and rounding not in ROUNDINGS:
        raise FormatError(
            f'"{rounding}" is not a rounding', where="--rounding", hint=nearest_names(rounding, ROUNDINGS)
        )
    given = parse_number(x)
    found = [inspect_value(given, name, rounding, seed) for name in split_names(format or [_SOME])]
    table = Table(
        "format",
        "rounding",
        "code",
        "value",
        "error",
        "relative",
        "below",
        "above",
        "note",
        box=None,
        header_style="bold",
    )
    for each in found:
        table.add_row(*map(escape, each.cells(given)))
    _console().print(f"x = {given!r}", markup=False)
    _console().print(table)


@dataclass(frozen=True)
class Inspection:
    """What a number becomes in one format."""

    name: str
    rounding: str
    code: str
    """Bits of the code, its fields apart; of a block format the scale's too."""
    value: float
    below: float | None
    """The largest value not above x; None if x is below all of them."""
    above: float | None
    note: str

    def cells(self, x: float) -> list[str]:
        """One row of the table of `inspect value`."""
        error = f"{self.value - x:+.6g}" if math.isfinite(x) else ""
        relative = f"{(self.value - x) / abs(x):+.4%}" if math.isfinite(x) and x != 0 else ""
        shown = [_exactly(self.value), error, relative]
        ends = ["" if end is None else _exactly(end) for end in (self.below, self.above)]
        return [self.name, self.rounding, self.code, *shown, *ends, self.note]


def inspect_value(x: float, name: str, rounding: Rounding | None = None, seed: int = 0) -> Inspection:
    """x in the format called `name`, under its own rounding or another."""
    if is_block_format(name):
        return _in_block(x, get_block_format(name), rounding, seed)
    return _in_scalar(x, get_format(name), rounding, seed)


def parse_number(text: str) -> float:
    """`0.3`, `1.5*2^-9`, `1/3`, `0x1.8p3`, `inf` or `nan` as a float64."""
    try:
        if matched := re.fullmatch(r"([+-]?)(?:(.+)\*)?2\^([+-]?\d+)", text):
            sign = -1.0 if matched[1] == "-" else 1.0
            return math.ldexp(sign * float(matched[2] or 1), int(matched[3]))
        if "/" in text:
            return float(Fraction(text))
        return float.fromhex(text) if "0x" in text.lower() else float(text)
    except (ValueError, ArithmeticError):
        raise FormatError(
            f'"{text}" is not a number', expected="one as 0.3, -1e-6, 2^-10, 1.5*2^-9, 1/3, 0x1.8p3, inf or nan"
        ) from None


def split_names(texts: list[str]) -> list[str]:
    """Names out of `e4m3,1-4-3:bias=11,top=none`: an option after a comma belongs to the name before it."""
    names: list[str] = []
    for part in ",".join(texts).split(","):
        if names and "=" in part and ":" not in part:
            names[-1] += f",{part}"
        else:
            names.append(part.strip())
    return names


def _in_scalar(x: float, row: Format, rounding: Rounding | None, seed: int) -> Inspection:
    mode, tensor = rounding or row.rounding, torch.tensor(x, dtype=torch.float64)
    q = float(quantize(tensor, row, mode, seed=seed))
    if math.isnan(x) and not row.has_nan:
        return Inspection(row.name, mode, "none", q, None, None, "NaN has no code")
    code = _bits(int(encode(tensor, row, mode, seed=seed)), row)
    if math.isnan(x):
        return Inspection(row.name, mode, code, q, None, None, "")
    below, above = neighbours(x, row)
    note = "; ".join(_notes(x, q, row, mode, seed))
    return Inspection(row.name, mode, code, q, below, above, note)


def _in_block(x: float, row: BlockFormat, rounding: Rounding | None, seed: int) -> Inspection:
    element, scale_row = get_format(row.element), get_format(row.scale)
    mode, tensor = rounding or element.rounding, torch.tensor([x], dtype=torch.float64)
    q = float(quantize(tensor, row, mode, seed=seed))
    coded = encode_blocks(tensor, row, mode, seed=seed)
    scale, tensor_scale = float(decode(coded.scales, scale_row)), float(coded.tensor_scale)
    code = f"{_bits(int(coded.codes), element)} | {_bits(int(coded.scales), scale_row)}"
    if math.isnan(scale):
        return Inspection(row.name, mode, code, q, None, None, "scale NaN: the whole block is NaN")
    note = [f"scale {number(scale)}" + (f" / {tensor_scale:.7g}" if row.is_two_level else "")]
    unit = scale * row.element_unit / tensor_scale
    if unit == 0:
        return Inspection(row.name, mode, code, q, 0.0, 0.0, note[0])
    y = x / unit
    if row.is_two_level:  # it is done in fp32
        y = float(torch.tensor(y, dtype=torch.float32))
    below, above = (
        None if end is None else _block_value(end, scale, coded.tensor_scale, row) for end in neighbours(y, element)
    )
    note += _notes(y, float(decode(coded.codes, element)), element, mode, seed)
    if q != x and "exact" in note:
        note.remove("exact")  # the element is, and the scale is not
    return Inspection(row.name, mode, code, q, below, above, "; ".join(note))


def _block_value(element: float, scale: float, tensor_scale: torch.Tensor, row: BlockFormat) -> float:
    product = element * row.element_unit * scale
    return float(torch.tensor(product, dtype=torch.float32) / tensor_scale) if row.is_two_level else product


def _notes(x: float, q: float, row: Format, mode: Rounding, seed: int) -> list[str]:
    """What is special about x becoming q."""
    notes: list[str] = []
    below, above = neighbours(x, row)
    if below is None or above is None:
        free = float(round_to_grid(torch.tensor(x, dtype=torch.float64), row, mode, seed=seed, overflow="unbounded"))
        is_out = not row.min <= free <= row.max
        notes.append("overflow: saturates" if is_out else "beyond the last value, rounds to it")
    elif below == above:
        notes.append("exact")
    elif mode == "stochastic":
        share = (Fraction(x) - Fraction(below)) / (Fraction(above) - Fraction(below))
        notes.append(f"above with probability {float(share):.4g}")
    elif Fraction(x) - Fraction(below) == Fraction(above) - Fraction(x):
        notes.append("tie")
    if q == 0 and below is not None and above is not None and below < above:
        notes.append("underflow to 0")
    if isinstance(row, FloatFormat) and 0 < abs(q) < row.min_normal:
        notes.append("subnormal")
    return notes


def _bits(code: int, row: Format) -> str:
    """The code in binary, the fields of a float apart."""
    bits = f"{code:0{row.bits}b}"
    if not isinstance(row, FloatFormat):
        return bits
    return " ".join(filter(None, (bits[0], bits[1 : 1 + row.exponent], bits[1 + row.exponent :])))


def _exactly(value: float) -> str:
    """All digits; a small power of two as one."""
    if math.isfinite(value) and 0 < abs(value) < 1e-3 and math.frexp(abs(value))[0] == 0.5:
        return number(value)
    return repr(value).removesuffix(".0")


def _console() -> Console:
    """Made per call, so that output goes to the stdout of now; as wide as the table, which a pipe takes whole."""
    console = Console(soft_wrap=True, highlight=False)
    return console if console.is_terminal else Console(soft_wrap=True, highlight=False, width=400)
