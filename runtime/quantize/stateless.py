"""Stateless: the quantizer of a spec that says everything, `e4m3 nearest_even row/amax` or `mxfp8 nearest_even column`.

A scale, if there is one, follows from the largest magnitude of what is cast (runtime/numerics/scaling.py). The grid
values of a block format hold the scales of their blocks; a two-level one (nvfp4) has a scale of the whole tensor more.
"""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.specs import QuantSpec
from runtime.quantize.qtensor import CastKey
from runtime.quantize.quantizer import AbstractQuantizer


@dataclass(frozen=True)
class Stateless(AbstractQuantizer):
    """Its spec, and nothing else."""

    spec: QuantSpec

    @property
    def key(self) -> CastKey:
        return CastKey(self.spec)

    def scale(self, x: Tensor) -> Tensor | None:
        return compute_scale(x.detach(), self.spec)


@lru_cache(maxsize=4096)
def quantizer_of(spec: QuantSpec) -> AbstractQuantizer:
    """The one without state that casts as `spec` says."""
    return Stateless(spec)
