"""Block casts: quantize, encode, decode in the formats of block_formats.py, blocks along the last dim - the oracle.

    value = element * scale / tensor_scale

    mx*     scale = 2^k, a code of e8m0; tensor_scale = 1                     OCP Microscaling Formats v1.0
    nvfp4   scale a code of e4m3; tensor_scale one fp32 number per tensor     NVIDIA Transformer Engine

k of an MX block comes from amax, its largest |x|, and the element format's largest value max = f 2^emax, 1 <= f < 2:

    floor   k = floor(log2 amax) - emax         the rule of the specification (6.3); what lies in (max, 2^(emax+1)) 2^k
                                                saturates
    ceil    k = ceil(log2 amax) - emax
    rceil   k = ceil(log2(amax / max))          the smallest scale under which nothing saturates; evaluated exactly,
                                                where hardware rounds amax / max to fp32 first
    even    floor of amax rounded to the element's significant digits, ties away

and is clamped to [-127, 127]: k = -127 for amax = 0. The scale of a block that holds NaN or Inf is NaN, and so is then
every value of the block, and of no other. Elements are rounded once, x / 2^k being exact in float64, and saturate. A
last block may be ragged: it is scaled by what it holds, as if padded with zeros.

nvfp4, every line rounded to fp32, amax_t over the tensor and amax_b over the block (TE's order of operations):

    tensor_scale  S = min(448 * 6 / amax_t, FLT_MAX); 1 if amax_t = 0      blocks with NaN or Inf left out of amax_t
    scale         s_b = e4m3(min(amax_b * (S * (1/6)), 448))               nearest-even; 0 for a block small enough
    element       e2m1(x * min(1 / (s_b * (1/S)), FLT_MAX))                saturated
    value         element * s_b / S                                        0 where s_b is 0

nvfp4-2d is the same for tiles of 16 x 16 of the last two dims. Three variants of nvfp4, where they differ:

    headroom  6 * 16/17 for 6 in S and s_b: a block scale that is rounded down clips nothing, and so stochastic rounding
              has no bias (0.3 % toward zero without it); Panferov et al., arXiv 2601.22813, their baseline
    four_six  448 is 256 in S. Per block also s_4 = e4m3(min(amax_b * (S * (1/4)), 448)), and the block has whichever of
              the two scales has the lesser squared error, sum (x / s - q)^2 * s^2, 6 if equal; arXiv 2512.02010
    eden      448 is 256 in S. Elements to nearest-even; then s_b = e4m3(s_b <x, x> / <x, q(x)>), the products over the
              128 elements of 8 blocks, rounded as `rounding` says: stochastically, block b drawing word offset + b, b
              flat in C order of the blocks. Where those 128 are turned at random before and back after, the mean is x:
              MS-EDEN, arXiv 2601.22813

Sums of squares and products are fp32, of x in units of its scale, added by halves: element i to i + 8, then 4, 2, 1; of
eight blocks likewise, each times its scale squared. Under eden a NaN or Inf reaches the 128 elements of its blocks.

Invariant, for fp32 x: with codes, scales, tensor_scale = encode_blocks(x, f),
decode_blocks(codes, scales, f, tensor_scale) is quantize(x, f), bit for bit.
Shape letters: K the last dim, B = ceil(K / block).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.errors import FormatError
from runtime.numerics.block_formats import EDEN_SPAN, BlockFormat, get_block_format
from runtime.numerics.codes import codes_of_grid, grid_of_codes
from runtime.numerics.format_kinds import FloatFormat, Format
from runtime.numerics.formats import get_format
from runtime.numerics.grid import round_to_grid
from runtime.numerics.scaling import divisor_of_amax, power_of_two
from runtime.numerics.specs import Rounding

RoundToGrid = Callable[[Tensor, Format, Rounding, Tensor | None, int, int, int, int], Tensor]


class BlockCodes(NamedTuple):
    """A tensor in a block format: what encode_blocks returns and decode_blocks takes."""

    codes: Tensor
    """uint8, the shape of x: one code of the element format each."""
    scales: Tensor
    """uint8, (..., B): one code of the scale format per block."""
    tensor_scale: Tensor
    """fp32, (): what every value is divided by; 1 for MX formats."""


@torch.no_grad()
def quantize_blocks(
    x: Tensor,
    format: str | BlockFormat,
    rounding: Rounding | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    round_with: RoundToGrid = round_to_grid,
) -> Tensor:
    """x on the grid of a block format, in x's dtype and shape; `casts.quantize` does this.

    rounding is that of the elements, None the element row's own; scales are never rounded stochastically. Element i
    draws the word of (seed, step, stream, offset + i), i flat in C order, as in any format. A value can overflow x's
    dtype where rounding went up: the largest fp32 under mxfp4:scale=rceil is 2^128.
    `round_with` rounds the elements: a kernel may bring its own.
    """
    row = get_block_format(format) if isinstance(format, str) else format
    q, scale, tensor_scale = _round_blocks(x, row, rounding, seed, step, stream, offset, round_with)
    return _values(q, scale, tensor_scale, row).to(x.dtype)


@torch.no_grad()
def encode_blocks(
    x: Tensor,
    format: str | BlockFormat,
    rounding: Rounding | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
) -> BlockCodes:
    """Codes and scales of quantize_blocks. In a block whose scale is NaN the codes are 0."""
    row = get_block_format(format) if isinstance(format, str) else format
    q, scale, tensor_scale = _round_blocks(x, row, rounding, seed, step, stream, offset)
    codes = codes_of_grid(torch.where(q.isnan(), 0.0, q), get_format(row.element))
    return BlockCodes(codes, codes_of_grid(scale, get_format(row.scale)), tensor_scale)


@torch.no_grad()
def decode_blocks(
    codes: Tensor, scales: Tensor, format: str | BlockFormat, tensor_scale: Tensor | float = 1.0
) -> Tensor:
    """The fp32 values of codes (..., K) with scales (..., B); tensor_scale as encode_blocks gave it."""
    row = get_block_format(format) if isinstance(format, str) else format
    if scales.shape != scale_shape(codes, row):
        raise FormatError(
            f"not the scales of {tuple(codes.shape)} codes of {row.name}",
            expected=str(tuple(scale_shape(codes, row))),
            got=str(tuple(scales.shape)),
        )
    q, scale = grid_of_codes(codes, get_format(row.element)), grid_of_codes(scales, get_format(row.scale))
    divisor = torch.as_tensor(tensor_scale, dtype=torch.float32, device=codes.device)
    return _values(q, scale, divisor, row).float()


@torch.no_grad()
def grid_of_blocks(
    x: Tensor, row: BlockFormat, rounding: Rounding, *, seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0
) -> Tensor:
    """element * scale, tensor_scale not divided out: fp32, or float64 for float64 x. x has at least one dim."""
    q, scale, _ = _round_blocks(x, row, rounding, seed, step, stream, offset)
    values = _values(q, scale, torch.ones((), device=x.device), row)
    return values if x.dtype == torch.float64 else values.float()


@torch.no_grad()
def block_units(
    amax: Tensor, row: BlockFormat, largest: float, round_with: RoundToGrid = round_to_grid
) -> tuple[Tensor, Tensor | None]:
    """What an element of 1 stands for in blocks of these max |x|, scale / tensor_scale in float64, 0 where the scale of
    a block is; and the tensor scale of a two-level format, of a tensor whose finite blocks reach `largest`.
    """
    if row.is_two_level:
        whole = torch.full((), largest, dtype=torch.float32, device=amax.device)
        scale, _, tensor_scale = _two_level_scales(amax.float(), row, None, whole, round_with)
        return scale.double() / tensor_scale.double(), tensor_scale
    return _shared_scales(amax.double(), row) * row.element_unit, None


def _round_blocks(
    x: Tensor, row: BlockFormat, rounding: Rounding | None, seed: int, step: int, stream: int, offset: int,
    round_with: RoundToGrid = round_to_grid,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Grid values of the elements in x's shape, NaN where the scale is; scales (..., B); the tensor scale."""
    if not x.is_floating_point():
        raise FormatError("only real numbers are quantized", expected="a floating-point tensor", got=str(x.dtype))
    element = get_format(row.element)
    if row.rule == "four_six":
        return _round_four_six(x.float(), row, rounding, (seed, step, stream, offset), round_with)
    if row.rule == "eden":
        return _round_eden(x.float(), row, rounding, (seed, step, stream, offset))
    if row.is_two_level:
        scale, factor, tensor_scale = _two_level_scales(block_amax(x.float(), row), row)
        scaled = x.float() * _per_element(factor, x, row)
    else:
        scale, tensor_scale = _shared_scales(block_amax(x.double(), row), row), torch.ones((), device=x.device)
        scaled = x.double() / (_per_element(scale, x, row) * row.element_unit)
    q = round_with(scaled, element, rounding or element.rounding, None, seed, step, stream, offset)
    return q, scale, tensor_scale


def _shared_scales(amax: Tensor, row: BlockFormat) -> Tensor:
    """2^k of each block in float64, NaN for an amax of NaN or Inf. The equations are at the head of the file."""
    largest, element = row.element_max, get_format(row.element)
    finite = torch.where(amax.isfinite(), amax, 0.0)
    fraction, exponent = torch.frexp(finite)  # amax = fraction 2^exponent, 1/2 <= fraction < 1
    k = exponent - 1 - (math.frexp(largest)[1] - 1)
    match row.rule:
        case "ceil":
            k = k + (fraction > 0.5)
        case "rceil":
            k = k + (finite > largest * power_of_two(k.clamp(-900, 900)))
        case "even":
            digits = element.mantissa if isinstance(element, FloatFormat) else element.bits - 2
            k = k + (2 * fraction >= 2 - 2.0 ** -(digits + 1))
    scale = power_of_two(torch.where(finite > 0, k, -127).clamp(-127, 127))
    return torch.where(amax.isfinite(), scale, torch.nan)


def _round_four_six(
    x: Tensor, row: BlockFormat, rounding: Rounding | None, draw: tuple[int, int, int, int], round_with: RoundToGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """As _round_blocks; both ways draw the same bits."""
    element, amax = get_format(row.element), block_amax(x, row)
    ways = []
    for target in (row.target, row.target * 2 / 3):
        scale, factor, tensor_scale = _two_level_scales(amax, row, target)
        scaled = x * _per_element(factor, x, row)
        q = round_with(scaled, element, rounding or element.rounding, None, *draw)
        off = scaled - q
        ways.append((q, scale, _sum_of_blocks(off * off, row) * (scale * scale)))
    (six, scale_six, error_six), (four, scale_four, error_four) = ways
    is_four = error_four < error_six
    q = torch.where(_per_element(is_four, x, row), four, six)
    return q, torch.where(is_four, scale_four, scale_six), tensor_scale


def _round_eden(
    x: Tensor, row: BlockFormat, rounding: Rounding | None, draw: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As _round_blocks; `rounding` is that of the corrected scale, None nearest-even."""
    scale, factor, tensor_scale = _two_level_scales(block_amax(x, row), row)
    scaled = x * _per_element(factor, x, row)
    q = round_to_grid(scaled, get_format(row.element), "nearest_even")
    of_x, of_q = (_sum_of_spans(scaled * y, scale, row) for y in (scaled, q))
    correction = torch.where(of_q == 0, 1.0, of_x / of_q)
    corrected = round_to_grid(scale * correction, get_format(row.scale), rounding or "nearest_even", None, *draw)
    return q.masked_fill(_per_element(corrected.isnan(), x, row), torch.nan), corrected, tensor_scale


def _sum_of_spans(terms: Tensor, scale: Tensor, row: BlockFormat) -> Tensor:
    """The sum of the terms of the blocks that share a correction, each block times its scale squared; (..., B)."""
    sums, num = _sum_of_blocks(terms, row) * (scale * scale), EDEN_SPAN // row.block
    padded = pad(sums, (0, -sums.shape[-1] % num)).unflatten(-1, (-1, num))
    return _halved(padded).repeat_interleave(num, dim=-1)[..., : sums.shape[-1]]


def _sum_of_blocks(terms: Tensor, row: BlockFormat) -> Tensor:
    """(..., B), in fp32, in the order that the head of the file says."""
    flat = terms.reshape(1) if terms.dim() == 0 else terms
    return _halved(pad(flat, (0, -flat.shape[-1] % row.block)).unflatten(-1, (-1, row.block)))


def _halved(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _two_level_scales(
    amax: Tensor, row: BlockFormat, target: float | None = None, whole: Tensor | None = None,
    round_with: RoundToGrid = round_to_grid,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(s_b, what x is multiplied by, S), in fp32; NaN, NaN in a block that holds NaN or Inf. target: the row's own;
    whole: the largest amax.
    """
    finite, greatest = torch.where(amax.isfinite(), amax, 0.0), torch.finfo(torch.float32).max
    if whole is None:
        whole = finite.amax() if finite.numel() else finite.new_zeros(())
    tensor_scale = divisor_of_amax(whole, row)
    per_max = torch.full_like(tensor_scale, 1.0 / (target or row.target))  # fp32(1 / 6)
    scaled = finite * (tensor_scale * per_max)
    scale = round_with(scaled, get_format(row.scale), "nearest_even", None, 0, 0, 0, 0)
    factor = (1.0 / (scale * (1.0 / tensor_scale))).clamp(max=greatest)
    is_bad = ~amax.isfinite()
    return scale.masked_fill(is_bad, torch.nan), factor.masked_fill(is_bad, torch.nan), tensor_scale


def _values(q: Tensor, scale: Tensor, tensor_scale: Tensor, row: BlockFormat) -> Tensor:
    """element * scale / tensor_scale: the product exact in float64, the quotient rounded once to fp32."""
    product = q.double() * _per_element(scale.double(), q, row) * row.element_unit
    return product.float() / tensor_scale if row.is_two_level else product


def block_amax(x: Tensor, row: BlockFormat) -> Tensor:
    """max |x| of each block, (..., B), of tiles (..., A, B); NaN if it holds one."""
    flat = x.reshape(1) if x.dim() == 0 else x
    num_blocks, (height, num_bands) = -(-flat.shape[-1] // row.block), _bands(flat, row)
    if not flat.numel():
        return flat.new_zeros(scale_shape(flat, row))
    padded = pad(flat, (0, num_blocks * row.block - flat.shape[-1]))
    amax = padded.reshape(*flat.shape[:-1], num_blocks, row.block).abs().amax(-1)
    if height == 1:
        return amax
    tall = pad(amax, (0, 0, 0, num_bands * height - amax.shape[-2]))
    return tall.unflatten(-2, (num_bands, height)).amax(-2)


def _bands(x: Tensor, row: BlockFormat) -> tuple[int, int]:
    """How many rows share a scale, 1 where x has none, and how many times."""
    height = row.height if x.dim() > 1 else 1
    return height, -(-x.shape[-2] // height) if height > 1 else 1


def _per_element(scale: Tensor, x: Tensor, row: BlockFormat) -> Tensor:
    """(..., B), or (..., A, B), repeated to the shape of x."""
    width, height = x.shape[-1] if x.dim() else 1, _bands(x, row)[0]
    wide = scale.repeat_interleave(row.block, dim=-1)[..., :width]
    if height > 1:
        wide = wide.repeat_interleave(height, dim=-2)[..., : x.shape[-2], :]
    return wide.reshape(x.shape)


def scale_shape(x: Tensor, row: BlockFormat) -> torch.Size:
    shape = x.shape or torch.Size((1,))
    lead = (*shape[:-2], _bands(x, row)[1]) if _bands(x, row)[0] > 1 else shape[:-1]
    return torch.Size((*lead, -(-shape[-1] // row.block)))
