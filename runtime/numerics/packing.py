"""Packing: grid values as the bits of their codes, in one buffer of bytes, and back - the oracle.

    buffer = codes, `bits` each, one after another  |  a code per block of its scale  |  a byte: a NaN was lost

The codes are those of runtime/numerics/codes.py; eight of `bits` <= 8 take `bits` bytes, the first in the lowest bits,
and codes of 9 to 16 bits two bytes each. Each matrix of a batch whose blocks lie down its columns begins a byte. The
last byte is there for a scalar format without a code for NaN.

A block is told by its values alone, however its scale was chosen. MX: the least 2^k under which none exceeds the
element's range, which loses none of those that a larger one gave. nvfp4: the first of amax / 6, / 4, / 3, / 2, / 1.5,
/ 1, / 0.5 that is a code of the scale and has every element on its grid. A block that holds NaN is NaN throughout.

Invariant, for q on the grid of the cast and NaN in a format that has it: unpack(pack(q)) is q, bit for bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.numerics.block_formats import BlockFormat, get_block_format, is_block_format
from runtime.numerics.codes import codes_of_grid, grid_of_codes
from runtime.numerics.format_kinds import FloatFormat, IntFormat
from runtime.numerics.formats import get_format
from runtime.numerics.range_formats import is_range_format
from runtime.numerics.scaling import power_of_two

MAX_BITS = 16


@dataclass(frozen=True)
class Packing:
    """How the values of a cast are packed, whatever their shape. `along` as a QuantSpec has it."""

    format: str
    along: str | None = None

    @property
    def block(self) -> BlockFormat | None:
        return get_block_format(self.format) if is_block_format(self.format) else None

    @property
    def element(self) -> str:
        """The format of the codes."""
        return self.block.element if self.block else self.format

    @property
    def bits(self) -> int:
        return get_format(self.element).bits

    @property
    def has_flag(self) -> bool:
        """Whether NaN has no code."""
        return self.block is None and not get_format(self.format).has_nan

    def matrices(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(matrices, rows, columns) of values of this shape; a scalar format sees one row."""
        if self.block is None:
            return 1, 1, math.prod(shape)
        *lead, columns = shape or (1,)
        if self.along == "batched-column":
            return math.prod(lead[:-1]), lead[-1] if lead else 1, columns
        return 1, math.prod(lead), columns

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix."""
        if self.block is None:
            return 0, 0
        size = self.block.block
        return (rows, -(-columns // size)) if self.along in (None, "row") else (-(-rows // size), columns)

    def code_bytes(self, rows: int, columns: int) -> int:
        """Of the codes of one matrix."""
        return (rows * columns * self.bits + 7) // 8 if self.bits <= 8 else 2 * rows * columns

    def nbytes(self, shape: Sequence[int]) -> int:
        """Of the buffer."""
        matrices, rows, columns = self.matrices(shape)
        down, across = self.blocks(rows, columns)
        return matrices * (self.code_bytes(rows, columns) + down * across) + self.has_flag


@lru_cache(maxsize=1024)
def packing_of(format: str, along: str | None, itemsize: int) -> Packing | None:
    """How grid values in a dtype of `itemsize` bytes are packed; None where their codes are no smaller, or are no bits
    of each value: a range format's lie anywhere in fp32.
    """
    if is_range_format(format):
        return None
    packing = Packing(format, along)
    row = get_format(packing.element)
    is_known = isinstance(row, FloatFormat | IntFormat) or row.bits <= 8
    takes = packing.bits if packing.bits <= 8 else 16
    if not is_known or packing.bits > MAX_BITS or takes >= 8 * itemsize:
        return None
    if packing.block is not None and packing.block.rule == "two_level" and packing.block.element != "e2m1":
        return None
    return packing


def pack(q: Tensor, packing: Packing) -> Tensor:
    """The buffer of values q on the grid, of any float dtype; 1-D uint8."""
    matrices, rows, columns = packing.matrices(q.shape)
    values = q.contiguous().double().view(matrices, rows, columns)
    row, block = get_format(packing.element), packing.block
    if block is None:
        is_nan = values.isnan()
        has_nan = packing.has_flag & is_nan.any()
        codes = codes_of_grid(torch.where(is_nan, 0.0, values) if packing.has_flag else values, row)
        flag = [has_nan.to(torch.uint8).view(1)] if packing.has_flag else []
        return torch.cat([_to_bytes(codes.view(1, -1), packing).flatten(), *flag])
    lanes = values if packing.along in (None, "row") else values.transpose(1, 2)
    elements, scales = _blocks(lanes, block)
    codes = codes_of_grid(elements, row)
    if packing.along not in (None, "row"):
        codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
    packed = _to_bytes(codes.reshape(matrices, rows * columns), packing)
    scale_codes = codes_of_grid(scales.reshape(-1), get_format(block.scale))
    return torch.cat([packed.flatten(), scale_codes])


def unpack(buffer: Tensor, shape: Sequence[int], packing: Packing, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, contiguous. All are NaN where the last byte says that one was lost."""
    matrices, rows, columns = packing.matrices(shape)
    row, block = get_format(packing.element), packing.block
    size = matrices * packing.code_bytes(rows, columns)
    codes = _from_bytes(buffer[:size].view(matrices, -1), rows * columns, packing)
    values = grid_of_codes(codes, row)
    if block is None:
        if packing.has_flag:
            values = torch.where(buffer[-1] != 0, torch.nan, values)
        return values.view(tuple(shape)).to(dtype)
    down, across = packing.blocks(rows, columns)
    scales = grid_of_codes(buffer[size:], get_format(block.scale)).view(matrices, down, across).double()
    dim = 2 if packing.along in (None, "row") else 1
    scales = scales.repeat_interleave(block.block, dim).narrow(dim, 0, (rows, columns)[dim - 1])
    values = values.view(matrices, rows, columns).double() * block.element_unit * scales
    return values.float().view(tuple(shape)).to(dtype)


def _blocks(x: Tensor, block: BlockFormat) -> tuple[Tensor, Tensor]:
    """Elements (..., K), 0 where the scale is NaN, and scales (..., B): blocks lie along the last dim."""
    size, num_k = block.block, x.shape[-1]
    num_blocks = -(-num_k // size)
    split = pad(x, (0, num_blocks * size - num_k)).view(*x.shape[:-1], num_blocks, size)
    amax = split.abs().amax(-1) if split.numel() else split.new_zeros(split.shape[:-1])
    is_nan = amax.isnan()
    amax = torch.where(is_nan, 0.0, amax)
    scale = _two_level_scale(split, amax, block) if block.rule == "two_level" else _shared_scale(amax, block)
    elements = torch.where(is_nan[..., None], 0.0, split / (scale * block.element_unit)[..., None])
    if block.rule != "two_level":  # 2^128 is an Inf of fp32
        elements = elements.clamp(-block.element_max / block.element_unit, block.element_max / block.element_unit)
    elements = elements.flatten(-2)[..., :num_k]
    return elements, torch.where(is_nan, torch.nan, scale)


def _shared_scale(amax: Tensor, block: BlockFormat) -> Tensor:
    """The least 2^k of e8m0 with amax <= element_max 2^k."""
    finite = amax.clamp(max=2.0**128)
    _, exponent = torch.frexp(finite / block.element_max)
    k = torch.where(finite > 0, exponent, -127)
    k = k - (finite <= block.element_max * power_of_two((k - 1).clamp(-900, 900))).to(k.dtype)
    return power_of_two(k.clamp(-127, 127))


def _two_level_scale(x: Tensor, amax: Tensor, block: BlockFormat) -> Tensor:
    """The first scale under which every value of the block is an element times the scale; 1 of a block of zeros."""
    element, scale_row = get_format(block.element), get_format(block.scale)
    assert isinstance(element, FloatFormat)
    assert isinstance(scale_row, FloatFormat)
    found = torch.ones_like(amax)
    is_open = amax > 0
    for magnitude in MAGNITUDES:
        scale = (amax / magnitude).clamp(max=scale_row.max)
        is_code = (grid_of_codes(codes_of_grid(scale, scale_row), scale_row).double() == scale) & (scale > 0)
        doubled = (x / torch.where(is_code, scale, 1.0)[..., None]).abs() * 2
        is_element = torch.zeros_like(doubled, dtype=torch.bool)
        for each in (0.0, *MAGNITUDES):
            is_element |= doubled == 2 * each
        fits = is_open & is_code & is_element.all(-1)
        found = torch.where(fits, scale, found)
        is_open = is_open & ~fits
    return found


MAGNITUDES = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
"""Of e2m1."""


def _to_bytes(codes: Tensor, packing: Packing) -> Tensor:
    """(S, N) codes as (S, bytes)."""
    bits = packing.bits
    if bits > 8:
        return codes.to(torch.int32).to(torch.int16).contiguous().view(torch.uint8)
    if bits == 8:
        return codes.to(torch.uint8)
    places = torch.arange(bits, device=codes.device)
    each = (codes[..., None].int() >> places & 1).flatten(1)
    each = pad(each, (0, -each.shape[1] % 8)).view(len(codes), -1, 8)
    return (each << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def _from_bytes(packed: Tensor, count: int, packing: Packing) -> Tensor:
    """(S, bytes) back as (S, count) codes."""
    bits = packing.bits
    if bits > 8:
        return packed.contiguous().view(torch.int16).int() & (2**bits - 1)
    if bits == 8:
        return packed.int()
    each = (packed[..., None].int() >> torch.arange(8, device=packed.device) & 1).flatten(1)
    each = each[:, : count * bits].view(len(packed), count, bits)
    return (each << torch.arange(bits, device=packed.device)).sum(-1)
