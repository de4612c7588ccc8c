"""QTensor: values on a number format's grid, with the scale that gives them back their size and the cast they are of.

    value == grid * expand(scale)          scale None is 1

`key` says of which cast: two casts of one tensor are the same cast, to be made once, kept or left out, only if their
keys are equal. Of a quantizer without state the key is its spec; one with state has a name and a version in it as well
(runtime/quantize/quantizer.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from runtime.numerics.specs import QuantSpec


class CastKey(NamedTuple):
    """Identity and version of a cast. Equal keys: the same values from the same tensor, unless a cast draws bits."""

    spec: QuantSpec
    owner: str = ""
    """The name of the quantizer whose state the cast depends on, SITE.x or SITE.w; "" where it has none."""
    version: int = 0
    """Of that state: it moves whenever the state is written."""

    @property
    def is_drawn(self) -> bool:
        """Whether a second cast gives other bits: then it is never shared, kept or left out."""
        return self.spec.is_stochastic


@dataclass(frozen=True)
class QTensor:
    """Grid values in the storage dtype of the format, and their scale, as runtime/numerics/scaling.py shapes it."""

    grid: Tensor
    scale: Tensor | None
    spec: QuantSpec
    owner: str = ""
    version: int = 0

    @property
    def key(self) -> CastKey:
        """Of the cast that made it."""
        return CastKey(self.spec, self.owner, self.version)

    @property
    def pair(self) -> tuple[Tensor, Tensor | None]:
        return self.grid, self.scale
