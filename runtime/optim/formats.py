"""Formats: in what an optimizer keeps the weights and its states, and how values of a format lie in memory.

    master      fp32, bf16, dlfloat16, 1-5-2, ... or bf16+16: a bf16 weight, and the 16 bits that make it an fp32
    momentum    the first moment, any scalar float format
    variance    the second moment, likewise; both also with a scale a block (runtime/optim/block_states.py): e4m3/128
    rounding    of every value that is kept in another format than fp32

The parameter itself is the master where its dtype holds every value of the format; else the master is a state, and the
parameter its nearest value. What no torch dtype stands for is kept as codes (runtime/numerics/codes.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from runtime.errors import NotSupported
from runtime.numerics import decode, encode
from runtime.numerics.embedding import embeds
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.specs import Rounding
from runtime.optim.block_names import block_state_of
from runtime.optim.split_master import SPLIT

PARAMETER_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Of the parameters that can be trained, with the format that each holds."""
_HELD = {name: dtype for dtype, name in PARAMETER_DTYPES.items()}


@dataclass(frozen=True)
class UpdateFormats:
    """The `update` section of a policy, as an optimizer takes it. NotSupported for what is no scalar float format."""

    master: str = "fp32"
    momentum: str = "fp32"
    variance: str = "fp32"
    rounding: Rounding = "nearest_even"

    def __post_init__(self) -> None:
        for key in ("master", "momentum", "variance"):
            name = getattr(self, key)
            if not (name == SPLIT if key == "master" else block_state_of(name)):
                storage_of(name)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is rounded: torch's own optimizers do the same."""
        return (self.master, self.momentum, self.variance) == ("fp32", "fp32", "fp32")

    def master_is_parameter(self, dtype: torch.dtype) -> bool:
        """Whether parameters of `dtype` are their own masters, with or without a remainder."""
        return self.master == SPLIT or embeds(self.master, PARAMETER_DTYPES[dtype])


@dataclass(frozen=True)
class Storage:
    """How values of one format lie in memory: as numbers of a torch dtype, or as codes in uint8 or int32. Codes of 9 to
    16 bits are pairs of uint8, in a last dimension of 2: no backend but NCCL's gathers int16.
    """

    format: str
    dtype: torch.dtype
    is_coded: bool
    is_paired: bool = False

    @property
    def nbytes(self) -> int:
        """Of one value."""
        return self.dtype.itemsize * (2 if self.is_paired else 1)

    def load(self, kept: Tensor) -> Tensor:
        """The values in fp32, exactly; a new tensor, of the shape of `kept`, which is flat for pairs."""
        kept = of_pairs(kept) if self.is_paired else kept
        if not self.is_coded:
            return kept.to(torch.float32, copy=True)
        bits = get_format(self.format).bits
        return decode(kept.to(torch.int32) & (2**bits - 1) if bits > 8 else kept, self.format)

    def store(self, values: Tensor, kept: Tensor) -> None:
        """Write values on the format's grid, fp32, into `kept`. FormatError for NaN where the format has none."""
        if self.is_paired:
            of_pairs(kept).copy_(encode(values, self.format).to(torch.int16))
        else:
            kept.copy_(encode(values, self.format).to(self.dtype) if self.is_coded else values)


def of_pairs(kept: Tensor) -> Tensor:
    """Flat pairs of uint8 as the int16 that they are; the same memory."""
    return kept.view(torch.int16)


@lru_cache(maxsize=256)
def storage_of(format: str) -> Storage:
    """The storage of a scalar float format: 1, 2 or 4 bytes. NotSupported for integers, tables and blocks."""
    row = get_format(format)
    if not isinstance(row, FloatFormat):
        raise NotSupported(
            f"{format} cannot hold a weight or a moment", expected="a float format", got=f"{type(row).__name__}",
            hint="fp32, bf16, dlfloat16, e4m3 or e5m2",
        )  # fmt: skip
    if format in _HELD:
        return Storage(format, _HELD[format], False)
    return Storage(format, torch.uint8 if row.bits <= 16 else torch.int32, True, 8 < row.bits <= 16)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) of fp32: bits(weight) = 2^16 bits(high) + low, high bf16, -2^15 <= low < 2^15 as int16.

    high is the nearest bf16, of a tie the larger in magnitude; Inf where that is beyond bf16, and the sum exact all the
    same. Of NaN the quiet one, sign kept.
    """
    bits = weight.view(torch.int32)
    nan = bits & -(2**31) | 0x7FC00000
    bits = torch.where(weight.isnan(), nan, bits)
    low = (bits & 0xFFFF).to(torch.int16)
    return (bits - low >> 16).to(torch.int16).view(torch.bfloat16), low


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 that `split` took apart."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)
