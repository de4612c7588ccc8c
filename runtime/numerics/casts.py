"""Casts: quantize, encode, decode - the oracle, written for the reader, in float64.

For a magnitude a = |x / scale| in a float format with lowest exponent emin and M fraction bits:

    k = max(floor(log2 a), emin)      the binade of a
    ulp = 2^(k - M)                   the spacing there; 1 for an integer format
    q = min(round(a / ulp) ulp, max)  rounded on that spacing (carrying into the next binade is automatic), saturated

Everything up to `round` is exact in float64. A format without subnormals has nothing between 0 and its smallest value:
there ulp is that value. The sign is put back at the end, so -0 and a negative that rounds to zero give -0 in a float
format; integers have no -0. NaN stays NaN. These functions are not differentiable: gradients are the callers' business.
"""

from typing import Literal

import torch
from torch import Tensor

from runtime.errors import FormatError, nearest_names
from runtime.numerics.formats import FloatFormat, Format, IntFormat, get_format
from runtime.numerics.random import random_bits
from runtime.numerics.rounding import round_to_integer
from runtime.numerics.scaling import expand_scale, power_of_two
from runtime.numerics.specs import ROUNDINGS, QuantSpec, Rounding

Overflow = Literal["saturate", "ieee"]
GridOverflow = Literal["saturate", "ieee", "unbounded"]


@torch.no_grad()
def quantize(
    x: Tensor,
    format: str | Format,
    rounding: Rounding | None = None,
    scale: Tensor | float | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: Overflow = "saturate",
) -> Tensor:
    """round_to_grid(x / scale) * scale, in x's dtype and shape.

    rounding None is the format row's own; scale None is 1, else a number or a tensor that broadcasts against x.
    Division and multiplication are in fp32, correctly rounded (float64 x: in float64); the result is then cast to x's
    dtype, which for fp16 and bf16 x can round again or overflow.
    Saturates: beyond the largest value, Inf too, gives the largest value. overflow="ieee" gives instead what the top
    code means, Inf (ieee) or NaN (nan, merged); a format with neither (top none, integers) saturates all the same.
    Overflow is judged after rounding: 464 is 448 in e4m3, by ties to even.
    Stochastic rounding of element i draws the word of (seed, step, stream, offset + i), i flat in C order.
    Raises FormatError: x integer or complex; scale not positive and finite; an unknown format, rounding or overflow.
    """
    row = get_format(format) if isinstance(format, str) else format
    if overflow not in ("saturate", "ieee"):
        raise FormatError(f'"{overflow}" is not an overflow rule', hint=nearest_names(overflow, ("saturate", "ieee")))
    divisor = None if scale is None else _checked_scale(scale, x)
    q = _to_grid(x, row, rounding or row.rounding, divisor, seed, step, stream, offset, overflow)
    return (q if divisor is None else q * divisor).to(x.dtype)


@torch.no_grad()
def to_grid(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor | None,
    *,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: GridOverflow = "saturate",
) -> Tensor:
    """The grid values round_to_grid(x / scale), saturated, the scale not multiplied back: what lp.quantize returns.

    float32 for fp32, fp16 and bf16 x, float64 for float64 x. `scale` is as `compute_scale` shapes it and is trusted to
    be positive and finite. The identity spec returns x itself. overflow="unbounded" rounds as if the exponent had no
    upper end, for those who must know what saturated.
    """
    if spec.is_identity:
        return x
    divisor = None if scale is None else expand_scale(scale, x.shape, spec)
    return _to_grid(x, get_format(spec.format), spec.rounding, divisor, seed, step, stream, offset, overflow)


@torch.no_grad()
def encode(
    x: Tensor,
    format: str | Format,
    rounding: Rounding | None = None,
    scale: Tensor | float | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    overflow: Overflow = "saturate",
) -> Tensor:
    """The codes of quantize's grid values: sign, exponent, fraction from the top bit down; integers two's complement.

    uint8 for formats of up to 8 bits, else int32 up to 31 bits, else int64; unused high bits are zero, so
    0 <= code < 2^bits. decode(encode(v)) == v for every v on the grid, -0 included. NaN takes the one NaN code whose
    fraction is all ones, sign kept; a format that has no NaN code raises FormatError, as an integer format does.
    """
    row = get_format(format) if isinstance(format, str) else format
    divisor = None if scale is None else _checked_scale(scale, x)
    q = _to_grid(x, row, rounding or row.rounding, divisor, seed, step, stream, offset, overflow).double()
    is_nan = q.isnan()
    if (not isinstance(row, FloatFormat) or row.top == "none") and bool(is_nan.any()):
        raise FormatError(f"{row.name} has no code for NaN", got=f"{int(is_nan.sum())} NaN", hint="cleaning the tensor")
    if not isinstance(row, FloatFormat):
        return (q.long() & (2**row.bits - 1)).to(_code_dtype(row.bits))
    magnitude = q.abs()
    exponent = _binade(magnitude, row.emin)
    fraction = magnitude * power_of_two(
        row.mantissa - exponent
    )  # in units of the spacing: [0, 2^M) below emin, else + 2^M
    lowest_field = 0 if row.zero_exponent_is_normal else 1
    normal = ((exponent.long() - row.emin + lowest_field) << row.mantissa) + (fraction.long() - 2**row.mantissa)
    subnormal = fraction.long()
    code = torch.where(fraction >= 2**row.mantissa, normal, subnormal)
    top = 2 ** (row.bits - 1) - 2**row.mantissa
    code = torch.where(magnitude.isinf(), top, code)
    code = torch.where(is_nan, 2 ** (row.bits - 1) - 1, code)
    return (code + (torch.signbit(q).long() << (row.bits - 1))).to(_code_dtype(row.bits))


@torch.no_grad()
def decode(codes: Tensor, format: str | Format) -> Tensor:
    """The fp32 values of codes 0 <= code < 2^bits (any integer dtype), by the equations of formats.py; encode undone.

    Every NaN code gives NaN; codes a format without subnormals does not use give zero. int32 values above 2^24 are
    rounded to fp32.
    """
    row = get_format(format) if isinstance(format, str) else format
    code = codes.long()
    if bool(((code < 0) | (code >> row.bits != 0)).any()):
        raise FormatError(f"not codes of {row.name}", expected=f"0 <= code < 2^{row.bits}")
    if not isinstance(row, FloatFormat):
        wraps = row.signed & (code >> (row.bits - 1))
        return (code - (wraps << row.bits)).float()
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
    return (sign * value).float()


def _to_grid(
    x: Tensor,
    row: Format,
    rounding: Rounding,
    scale: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    offset: int,
    overflow: GridOverflow,
) -> Tensor:
    """round(x / scale) on the grid of `row`: float32, or float64 for float64 x."""
    if not x.is_floating_point():
        raise FormatError("only real numbers are quantized", expected="a floating-point tensor", got=str(x.dtype))
    if rounding not in ROUNDINGS:
        raise FormatError(f'"{rounding}" is not a rounding', hint=nearest_names(rounding, ROUNDINGS))
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(working) if scale is None else x.to(working) / scale.to(working)
    wide = y.double()
    a = wide.abs()
    ulp = _spacing(a, row)
    # Exact, ulp being a power of two, except for a below a smallest value that is none (dlfloat16). There too t is 1/2
    # only at the tie: the next float64 to ulp / 2 is farther than 2^-53 off in proportion, so its t farther than 2^-54.
    t = a / ulp
    u = None
    if rounding == "stochastic":
        words = random_bits(x.numel(), seed=seed, step=step, stream=stream, offset=offset, device=x.device)
        u = (words.double() * 2.0**-32).reshape(x.shape)
    q = torch.copysign(round_to_integer(t, rounding, u) * ulp, wide)
    if isinstance(row, FloatFormat):
        top = {"ieee": torch.inf, "none": row.max}.get(row.top, torch.nan)
        above = {"saturate": row.max, "ieee": top, "unbounded": q.abs()}[overflow]
        q = torch.where(q.abs() > row.max, torch.copysign(torch.as_tensor(above).to(q), wide), q)
    else:
        low, high = int_range(row, working) if overflow != "unbounded" else (-torch.inf, torch.inf)
        q = q.clamp(low, high) + 0.0  # -0 + 0 is 0
    return torch.where(wide.isnan(), wide, q).to(working)


def _spacing(a: Tensor, row: Format) -> Tensor:
    """The distance of the two grid values around a >= 0, in float64."""
    if not isinstance(row, FloatFormat):
        return torch.ones_like(a)
    ulp = power_of_two(_binade(a, row.emin) - row.mantissa)
    return ulp if row.subnormals else torch.where(a < row.tiny, row.tiny, ulp)


def _binade(a: Tensor, emin: int) -> Tensor:
    """max(floor(log2 a), emin) as int32; emin for 0, Inf and NaN."""
    _, exponent = torch.frexp(torch.where(a.isfinite(), a, 0.0))  # a = f 2^exponent, 1/2 <= f < 1; exponent 0 for a = 0
    return torch.where(a > 0, exponent - 1, emin).clamp(min=emin)


def int_range(row: IntFormat, working: torch.dtype) -> tuple[float, float]:
    """(min, max), in fp32 moved inward to the nearest fp32: int32 ends at 2^31 - 128 there."""
    high = row.max
    if working == torch.float32 and high > 2**24:
        high += 1 - 2.0 ** (row.bits - row.signed - 24)
    return (-high if row.signed and row.narrow else row.min), high


def _checked_scale(scale: Tensor | float, x: Tensor) -> Tensor:
    """The scale as a tensor in the working dtype; FormatError unless every element is positive and finite."""
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensor = torch.as_tensor(scale, dtype=working, device=x.device)
    if not bool((tensor.isfinite() & (tensor > 0)).all()):
        raise FormatError("a scale divides and must not be zero, negative, Inf or NaN", expected="0 < scale < Inf")
    return tensor


def _code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32 if bits <= 31 else torch.int64
