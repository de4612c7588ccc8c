"""Codec: how gradients are written as bytes for the wire. One class a way of writing; a wire spec says which gradient
goes by which.

    BlockCodec    | codes, 1 byte an element | scales, fp32, one a block |
                  value = code * scale        scale = amax(block) / max(format), 1 for a block of zeros
    PlainCodec    the bytes of the dtype it has

A message is the lanes one behind the other, each written by its codec. Shape letters: N elements, B blocks, K elements
of a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from runtime.collectives.wire_format import check_wire_format
from runtime.errors import WireError
from runtime.kernels.cast.public import decode, encode
from runtime.numerics.formats import get_format

Kind = Literal["gradient_compressed", "gradient_full"]


class Codec(ABC):
    """A way to write a flat run of N values. Codecs are values: equal ones write the same bytes."""

    kind: ClassVar[Kind]
    """As what its bytes are counted."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` values, no padding."""

    @abstractmethod
    def encode(self, x_N: Tensor) -> Tensor:
        """x as uint8. Invariant: `encode(x).numel() == nbytes(x.numel())`."""

    @abstractmethod
    def decode(self, buffer: Tensor, numel: int) -> Tensor:
        """The fp32 values of what `encode` wrote for `numel` values. Raises WireError for another length."""


@dataclass(frozen=True)
class PlainCodec(Codec):
    """Full precision: the bytes as they are."""

    kind: ClassVar[Kind] = "gradient_full"
    dtype: torch.dtype

    def nbytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def encode(self, x_N: Tensor) -> Tensor:
        return x_N.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, buffer: Tensor, numel: int) -> Tensor:
        _check_length(buffer, numel, self)
        return buffer.clone().view(self.dtype).float()  # clone: a view of wider elements starts at a multiple of theirs


@dataclass(frozen=True)
class BlockCodec(Codec):
    """An 8-bit format, scaled block by block.

    scale = amax(block) / max(format), not below 2^-126 so that it never flushes to zero; code = format(x / scale). The
    ragged last block is scaled by what it holds, as if padded with zeros. NaN or Inf in a block makes its scale NaN or
    Inf, so the whole block comes back non-finite and the others intact. Decoded, a finite x differs from itself by at
    most half an ulp of the format, or half the format's smallest step times the scale.
    """

    kind: ClassVar[Kind] = "gradient_compressed"
    format: str = "e4m3"
    block: int = 256

    def nbytes(self, numel: int) -> int:
        """One a code, four a block."""
        return numel + 4 * -(-numel // self.block)

    def encode(self, x_N: Tensor) -> Tensor:
        if x_N.dim() != 1 or not x_N.is_floating_point():
            raise WireError(
                "a codec takes one flat tensor", expected="1 dim of floats", got=f"{x_N.dim()} dims of {x_N.dtype}"
            )
        x_N = x_N.float().contiguous()
        buffer = torch.empty(self.nbytes(x_N.numel()), dtype=torch.uint8, device=x_N.device)
        codes_N = buffer[: x_N.numel()]
        scales: list[Tensor] = []
        for codes_BK, x_BK in zip(_blocks(codes_N, self.block), _blocks(x_N, self.block)):
            scale_B1 = _block_scales(x_BK, self.format)
            _encode_into(codes_BK, x_BK / scale_B1, self.format)
            scales.append(scale_B1.flatten())
        if scales:
            buffer[x_N.numel() :] = torch.cat(scales).view(torch.uint8)
        return buffer

    def decode(self, buffer: Tensor, numel: int) -> Tensor:
        """code * scale, rounded once to fp32."""
        _check_length(buffer, numel, self)
        x_N = _decode(buffer[:numel], self.format)
        scale_B = buffer[numel:].clone().view(torch.float32)  # clone: an fp32 view starts at a multiple of 4 bytes
        start = 0
        for x_BK in _blocks(x_N, self.block):
            x_BK.mul_(scale_B[start : start + len(x_BK), None])
            start += len(x_BK)
        return x_N


@dataclass(frozen=True)
class WireSpec:
    """Which gradients are compressed, and how: what a policy's `wire` section says."""

    format: str = "e4m3"
    """Number format of the codes; 8 bits, so that one element is one byte."""
    block: int = 256
    """Elements that share one fp32 scale: 256 costs 4 / 256 = 1.6 % on top of the codes."""
    min_numel: int = 1024
    """Tensors with fewer elements, and all 1-D ones, travel in full precision: they are few bytes and move the loss."""

    def __post_init__(self) -> None:
        check_wire_format(self.format, self.block)

    @property
    def compressor(self) -> Codec:
        """The codec of what is compressed."""
        return BlockCodec(self.format, self.block)

    def compresses(self, shape: Sequence[int]) -> bool:
        """True if a gradient of this shape travels as codes, False if in full precision."""
        return len(shape) > 1 and torch.Size(shape).numel() >= self.min_numel

    def codec(self, shape: Sequence[int], dtype: torch.dtype) -> Codec:
        """By which codec a gradient of this shape travels; `dtype` is the one of full precision."""
        return self.compressor if self.compresses(shape) else PlainCodec(dtype)


def _check_length(buffer: Tensor, numel: int, codec: Codec) -> None:
    if buffer.dtype != torch.uint8 or buffer.numel() != codec.nbytes(numel):
        raise WireError(
            "not a packed buffer",
            expected=f"{codec.nbytes(numel)} bytes of uint8 for {numel} elements",
            got=f"{buffer.numel()} elements of {buffer.dtype}",
        )


def _blocks(x_N: Tensor, block: int) -> Iterator[Tensor]:
    """Views of x: the whole blocks as one [B, K] matrix, then the ragged end as one row."""
    whole = x_N.numel() // block * block
    if whole:
        yield x_N[:whole].view(-1, block)
    if whole < x_N.numel():
        yield x_N[whole:].view(1, -1)


def _block_scales(x_BK: Tensor, format: str) -> Tensor:
    amax_B1 = x_BK.abs().amax(1, keepdim=True)
    scale_B1 = (amax_B1 / get_format(format).max).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax_B1 == 0, 1.0, scale_B1)


_TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Formats that torch casts to itself, nearest even. |x / scale| <= max, so that no value reaches its overflow rule."""


def _encode_into(codes: Tensor, scaled: Tensor, format: str) -> None:
    if dtype := _TORCH_DTYPES.get(format):
        codes.view(dtype).copy_(scaled)
    else:
        codes.copy_(encode(scaled.nan_to_num(0.0, 0.0, 0.0), format))  # the scale carries NaN and Inf


def _decode(codes_N: Tensor, format: str) -> Tensor:
    """fp32 values of the codes. 4.2M of them on one CPU core: 5 ms by table; by torch 19 ms for e4m3, 3 ms for e5m2."""
    if format in _TORCH_DTYPES and (format == "e5m2" or codes_N.is_cuda):
        return codes_N.view(_TORCH_DTYPES[format]).float()
    return _value_table(format, codes_N.device).index_select(0, codes_N.int())


@lru_cache(maxsize=64)
def _value_table(format: str, device: torch.device) -> Tensor:
    """The fp32 values of codes 0 to 255."""
    return decode(torch.arange(256, device="cpu"), format).to(device)
