"""Codes: the bits of a grid value, and back.

    float   sign, exponent, fraction from the top bit down       int   two's complement, or value + zero
    lookup  the index in the table

0 <= code < 2^bits; uint8 for formats of up to 8 bits, else int32 up to 31 bits, else int64.
"""

import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.numerics.format_kinds import FloatFormat, Format, LookupFormat
from runtime.numerics.grid import binade
from runtime.numerics.scaling import power_of_two


def codes_of_grid(q: Tensor, row: Format) -> Tensor:
    """The codes of values that are on the grid of `row`, or NaN, or the Inf of a format that has one; any float dtype.

    NaN takes the one NaN code whose fraction is all ones, sign kept; in a table, or without -0, the only one.
    FormatError for NaN in a format that has no code for it.
    """
    q = q.double()
    is_nan = q.isnan()
    if not row.has_nan and bool(is_nan.any()):
        raise FormatError(f"{row.name} has no code for NaN", got=f"{int(is_nan.sum())} NaN", hint="cleaning the tensor")
    if isinstance(row, LookupFormat):
        code = _codes_in_table(q, row)
    elif isinstance(row, FloatFormat):
        code = _codes_of_floats(q, is_nan, row)
    else:
        code = q.long() + row.zero & (2**row.bits - 1)
    return code.to(code_dtype(row.bits))


def grid_of_codes(codes: Tensor, row: Format) -> Tensor:
    """The fp32 values of codes of any integer dtype, by the equations of format_kinds.py; int32 values above 2^24 are
    rounded.
    """
    code = codes.long()
    if bool(((code < 0) | (code >> row.bits != 0)).any()):
        raise FormatError(f"not codes of {row.name}", expected=f"0 <= code < 2^{row.bits}")
    if isinstance(row, LookupFormat):
        return torch.tensor(row.values, dtype=torch.float32, device=codes.device)[code]
    if not isinstance(row, FloatFormat):
        wraps = row.signed & (code >> (row.bits - 1))
        return (code - (wraps << row.bits) - row.zero).float()
    sign = 1.0 - 2.0 * (code >> (row.bits - 1)).double()
    field = code >> row.mantissa & (2**row.exponent - 1)
    m = code & (2**row.mantissa - 1)
    leading = (m + 2**row.mantissa).double() * power_of_two(field - row.bias - row.mantissa)
    is_normal = (field > 0) | (row.zero_exponent_is_normal & (m > 0))
    value = torch.where(is_normal, leading, m.double() * row.quantum * row.subnormals)
    last = field == 2**row.exponent - 1
    all_ones = last & (m == 2**row.mantissa - 1)
    if row.top == "ieee":
        value = torch.where(last, torch.where(m == 0, torch.inf, torch.nan), value)
    elif row.top in ("nan", "merged"):
        value = torch.where(all_ones, torch.nan, value)
    elif row.top == "p3109":
        value = torch.where(all_ones, torch.inf, value)
    if not row.has_negative_zero:
        value = torch.where(code == 1 << (row.bits - 1), torch.nan, value)
    return (sign * value).float()


def _codes_of_floats(q: Tensor, is_nan: Tensor, row: FloatFormat) -> Tensor:
    magnitude = q.abs()
    exponent = binade(magnitude, row.emin)
    # in units of the spacing: [0, 2^M) below emin, else + 2^M
    fraction = magnitude * power_of_two(row.mantissa - exponent)
    lowest_field = 0 if row.zero_exponent_is_normal else 1
    normal = ((exponent.long() - row.emin + lowest_field) << row.mantissa) + (fraction.long() - 2**row.mantissa)
    code = torch.where(fraction >= 2**row.mantissa, normal, fraction.long())
    infinity = 2 ** (row.bits - 1) - (1 if row.top == "p3109" else 2**row.mantissa)
    code = torch.where(magnitude.isinf(), infinity, code)
    sign = torch.signbit(q).long() << (row.bits - 1)
    if not row.has_negative_zero:
        return torch.where(is_nan, 1 << (row.bits - 1), code + torch.where(magnitude == 0, 0, sign))
    return torch.where(is_nan, 2 ** (row.bits - 1) - 1, code) + sign


def _codes_in_table(q: Tensor, row: LookupFormat) -> Tensor:
    code_of = {value: code for code, value in reversed(list(enumerate(row.values)))}  # of two zeros the first
    nan = next((code for code, value in enumerate(row.values) if value != value), 0)
    table = torch.tensor(row.grid, dtype=torch.float64, device=q.device)
    codes = torch.tensor([code_of[value] for value in row.grid], device=q.device)
    code = codes[torch.searchsorted(table, q.nan_to_num(0.0)).clamp(max=len(table) - 1)]
    if row.has_negative_zero:
        minus = next(code for code, value in enumerate(row.values) if str(value) == "-0.0")
        code = torch.where((q == 0) & torch.signbit(q), minus, code)
    return torch.where(q.isnan(), nan, code)


def code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32 if bits <= 31 else torch.int64
