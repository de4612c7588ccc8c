"""Block: a quantizer of a block format, whose grid values hold the scales of their blocks; no state.

A two-level format (nvfp4) has one scale more, of the whole tensor, which is a scale as any other.
"""

from dataclasses import dataclass

from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.specs import QuantSpec
from runtime.quantize.qtensor import CastKey
from runtime.quantize.quantizer import AbstractQuantizer


@dataclass(frozen=True)
class Block(AbstractQuantizer):
    """`mxfp8 nearest_even column`."""

    spec: QuantSpec

    @property
    def key(self) -> CastKey:
        return CastKey(self.spec)

    def scale(self, x: Tensor) -> Tensor | None:
        return compute_scale(x.detach(), self.spec) if self.spec.has_scale else None
