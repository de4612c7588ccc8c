"""Sampling: a part of a tensor that casts as the whole does.

    x, rows of its matrix view     the part: whole rows, in runs of `unit` rows, evenly spread over all rows

A cast of the part gives the values that the cast of the whole has there: its rows are whole, blocks and tiles begin
where those of the whole do, and what depends on all of the tensor (its largest magnitude, the scale of a column) is
taken from the whole. Of a product of batches a run lies within one matrix.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.format_kinds import filled_to
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import MAX_SCALE, MIN_SCALE, block_lanes, matrix_shape
from runtime.numerics.specs import Along, QuantSpec, ScaleSpec

DOWN, ACROSS = 32, 8
"""Rows of a run: where blocks lie down the columns a multiple of the blocks of every block format, else fewer."""


def run_of(spec: QuantSpec) -> int:
    """Rows of a run in which a cast gives what it gives on the whole tensor."""
    if spec.scale is not None and spec.scale.granularity == "block":
        return math.lcm(ACROSS, spec.scale.block[0])
    return DOWN if spec.is_block and spec.along in ("column", "batched-column") else ACROSS


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
    _laid: "dict[Along, Sample]" = field(default_factory=dict, repr=False, compare=False)
    _block_amax: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def wide(self) -> Tensor:
        """The part flat, in fp32 (float64 for float64 x), 0 where it is not finite."""
        wide = self.part.to(torch.float64 if self.x.dtype == torch.float64 else torch.float32).flatten()
        return wide if math.isfinite(self.largest) else torch.where(wide.isfinite(), wide, 0.0)

    @cached_property
    def is_nonzero(self) -> Tensor:
        return self.wide != 0

    @cached_property
    def inverse(self) -> Tensor:
        """1 / |x|, 0 where x is 0, and where 1 / |x| is beyond what x's dtype holds."""
        inverse = self.wide.abs().reciprocal_()
        return torch.where(inverse.isfinite(), inverse, 0.0)

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Elements, those that are not 0, and sum x^2, each float64 ()."""
        x = self.wide.double()
        return (
            torch.full((), x.numel(), dtype=x.dtype, device=x.device),
            self.is_nonzero.sum().double(),
            torch.dot(x, x),
        )

    @cached_property
    def none(self) -> tuple[Tensor, Tensor]:
        """Two zeros."""
        zero = torch.zeros((), dtype=torch.int64, device=self.x.device)
        return zero, zero

    def take(self, values: Tensor) -> Tensor:
        """The part of a tensor of x's shape."""
        return values if self.runs is None else _runs_of(values, self.part.shape[1], self.runs)

    def scale(self, spec: QuantSpec) -> Tensor | None:
        """The scale of a cast of x, in the shape that a cast of the part takes; not of a block format's tensor."""
        if spec.scale is None:
            return None
        granularity, rule = spec.scale.granularity, spec.scale.rule
        if granularity == "tensor" and rule != "sawb":
            return torch.full((), _scale_of(self.largest, spec), dtype=torch.float32, device=self.x.device)
        if granularity == "tensor":
            return compute_scale(self.x, spec)
        # a scale follows from the largest of its line: that of a line which holds nothing else
        return compute_scale(self._columns if granularity == "column" else self.part, spec)

    def laid(self, along: Along | None) -> "Sample":
        """This sample with its blocks along the last dim, elements in another order."""
        if along in (None, "row"):
            return self
        if along not in self._laid:
            lanes = block_lanes(self.part, along)
            turned = lanes.reshape(-1, lanes.shape[-1]).contiguous()
            self._laid[along] = Sample(self.x, turned, self.runs, self.largest)
        return self._laid[along]

    def block_amax(self, block: int) -> Tensor:
        """max |x| of runs of `block` elements along the last dim, (rows, runs), fp32; 1 of a run that holds nothing but
        zeros or something that is not finite.
        """
        if block not in self._block_amax:
            matrix = self.part.reshape(-1, self.part.shape[-1] if self.part.dim() else 1)
            # the scale of a format whose largest value is 1
            amax = compute_scale(matrix, QuantSpec("ternary", scale=ScaleSpec("block", "amax", (1, block))))
            assert amax is not None
            self._block_amax[block] = amax
        return self._block_amax[block]

    def all_laid(self, along: Along | None) -> Tensor:
        """All of x with its blocks along the last dim."""
        lanes = block_lanes(self.x, along)
        return lanes.reshape(-1, lanes.shape[-1] if lanes.dim() else 1)

    @cached_property
    def _columns(self) -> Tensor:
        num_rows, width = matrix_shape(self.x.shape)
        matrix = self.x.reshape(num_rows, width)
        return matrix.abs().amax(0).reshape(*(1,) * (self.part.dim() - 1), -1) if num_rows else self.part[:1]


@torch.no_grad()
def sample_of(
    x: Tensor, size: int, *, is_batched: bool = False, run: int = DOWN, largest: float | None = None
) -> Sample:
    """About `size` elements of x, at least one run of `run` rows. Ragged rows at the end are in no run. largest: of x,
    where it is known.
    """
    x = x.detach()
    largest = largest_of(x) if largest is None else largest
    whole = Sample(x, x, None, largest)
    num_rows, width = matrix_shape(x.shape)
    unit = run
    if is_batched and x.dim() > 2 and x.shape[-2] % unit:
        unit = x.shape[-2]
    num_runs = num_rows // unit if unit else 0
    wanted = max(1, size // max(unit * width, 1))
    if x.numel() <= size or num_runs <= wanted:
        return whole
    runs = torch.arange(wanted, device=x.device).mul_(2).add_(1).mul_(num_runs).div_(2 * wanted, rounding_mode="floor")
    return Sample(x, _runs_of(x, unit, runs), runs, largest)


def largest_of(x: Tensor) -> float:
    """max |x|; NaN or Inf where x holds one."""
    if not x.numel():
        return 0.0
    low, high = map(float, torch.aminmax(x))
    return math.nan if math.isnan(low) else max(abs(low), abs(high))


def _scale_of(largest: float, spec: QuantSpec) -> float:
    """That of runtime/numerics/scaling.py for a tensor with this largest magnitude, before it is rounded to fp32."""
    assert spec.scale is not None
    if not 0 < largest < math.inf:
        return 1.0
    scale = largest / filled_to(get_format(spec.format))
    if spec.scale.rule == "pow2":
        fraction, exponent = math.frexp(scale)
        scale = 2.0 ** min(max(exponent - (fraction == 0.5), -126), 127)
    return min(max(scale, MIN_SCALE), MAX_SCALE)


def _runs_of(x: Tensor, unit: int, runs: Tensor) -> Tensor:
    num_rows, width = matrix_shape(x.shape)
    matrix = x.reshape(num_rows, width)[: num_rows // unit * unit]
    return matrix.view(-1, unit, width).index_select(0, runs)


def channels_as_rows(x: Tensor, spec: QuantSpec) -> tuple[Tensor, QuantSpec]:
    """A weight (C, ...) with a scale per channel as a matrix (C, rest) with one per row: the same cast."""
    assert spec.scale is not None
    row = ScaleSpec("row", spec.scale.rule)
    return x.reshape(x.shape[0], -1), QuantSpec(spec.format, spec.rounding, row)
