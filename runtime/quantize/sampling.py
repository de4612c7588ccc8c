"""Sampling: a part of a tensor that casts as the whole does.

    x, rows of its matrix view     the part: whole rows, in runs of `unit` rows, evenly spread over all rows

A cast of the part gives the values that the cast of the whole has there: its rows are whole, blocks and tiles begin
where those of the whole do, and what depends on all of the tensor (its largest magnitude, the scale of a column) is
taken from the whole. Of a product of batches a run lies within one matrix.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.scaling import matrix_shape
from runtime.numerics.specs import QuantSpec, ScaleSpec

RUN = 32
"""Rows of a run: a multiple of the blocks of every block format."""


@dataclass(frozen=True)
class Sample:
    """`part` of x, in x's dtype: (runs, unit, K), or x itself where that is small. `largest`: max |x|, NaN or Inf where
    x holds one.
    """

    x: Tensor
    part: Tensor
    runs: Tensor | None
    """Numbers of the runs that were taken; None: the part is all of x."""
    largest: float

    @cached_property
    def wide(self) -> Tensor:
        """The part in float64 and flat, 0 where it is not finite."""
        wide = self.part.double().flatten()
        return wide if math.isfinite(self.largest) else torch.where(wide.isfinite(), wide, 0.0)

    @cached_property
    def inverse(self) -> Tensor:
        """1 / |x|, 0 where x is 0."""
        return torch.where(self.is_nonzero, self.wide.abs().reciprocal_(), 0.0)

    @cached_property
    def is_nonzero(self) -> Tensor:
        return self.wide != 0

    def take(self, values: Tensor) -> Tensor:
        """The part of a tensor of x's shape."""
        return values if self.runs is None else _runs_of(values, self.part.shape[1], self.runs)

    def scale(self, spec: QuantSpec) -> Tensor | None:
        """The scale of a cast of x, in the shape that a cast of the part takes; not of a block format's tensor."""
        if spec.scale is None:
            return None
        is_tensor = spec.scale.granularity == "tensor" and spec.scale.rule in ("amax", "pow2")
        if is_tensor and math.isfinite(self.largest):
            return compute_scale(torch.full((1,), self.largest, dtype=self.x.dtype, device=self.x.device), spec)
        if spec.scale.granularity in ("tensor", "column"):
            scale = compute_scale(self.x, spec)
            assert scale is not None
            return scale if scale.dim() == 0 else scale.reshape(*(1,) * (self.part.dim() - 1), -1)
        return compute_scale(self.part, spec)


@torch.no_grad()
def sample_of(x: Tensor, size: int, *, is_batched: bool, tile_rows: int = 1) -> Sample:
    """About `size` elements of x, at least one run of rows. tile_rows: a run is a multiple of it, too. Ragged rows at
    the end are in no run.
    """
    x = x.detach()
    low, high = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    largest = max(abs(float(low)), abs(float(high))) if not bool(low.isnan()) else math.nan
    whole = Sample(x, x, None, largest)
    num_rows, width = matrix_shape(x.shape)
    unit = math.lcm(RUN, tile_rows)
    if is_batched and x.dim() > 2 and x.shape[-2] % unit:
        unit = x.shape[-2]
    num_runs = num_rows // unit if unit else 0
    wanted = max(1, size // max(unit * width, 1))
    if x.numel() <= size or num_runs <= wanted:
        return whole
    runs = torch.arange(wanted, device=x.device).mul_(2).add_(1).mul_(num_runs).div_(2 * wanted, rounding_mode="floor")
    return Sample(x, _runs_of(x, unit, runs), runs, largest)


def _runs_of(x: Tensor, unit: int, runs: Tensor) -> Tensor:
    num_rows, width = matrix_shape(x.shape)
    matrix = x.reshape(num_rows, width)[: num_rows // unit * unit]
    return matrix.view(-1, unit, width).index_select(0, runs)


def channels_as_rows(x: Tensor, spec: QuantSpec) -> tuple[Tensor, QuantSpec]:
    """A weight (C, ...) with a scale per channel as a matrix (C, rest) with one per row: the same cast."""
    assert spec.scale is not None
    row = ScaleSpec("row", spec.scale.rule)
    return x.reshape(x.shape[0], -1), QuantSpec(spec.format, spec.rounding, row)
