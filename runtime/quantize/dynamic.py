"""Dynamic: a quantizer whose scale, if it has one, follows from the largest magnitude of what it casts; no state."""

from dataclasses import dataclass

from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.specs import QuantSpec
from runtime.quantize.qtensor import CastKey
from runtime.quantize.quantizer import AbstractQuantizer


@dataclass(frozen=True)
class Dynamic(AbstractQuantizer):
    """`e4m3 nearest_even row/amax`: the scale of runtime/numerics/scaling.py."""

    spec: QuantSpec

    @property
    def key(self) -> CastKey:
        return CastKey(self.spec)

    def scale(self, x: Tensor) -> Tensor | None:
        return compute_scale(x.detach(), self.spec)
