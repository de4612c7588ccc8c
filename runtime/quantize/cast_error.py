"""Cast error: what a cast does to a tensor, counted on a sample of it.

    values v = grid * scale of x         underflow   x != 0 and v == 0
                                         overflow    |x| beyond the format's largest value under its scale, rounded
                                         saturated   v is that largest value
    SQNR = 10 log10(sum x^2 / sum (v - x)^2) dB        relative error = mean |v - x| / |x| over x != 0

Sums are in float64, of what is finite. Casts draw no bits of a model's streams: stochastic rounding has a key of its
own here. In a block format the largest value is that of an element under the scale of its block; a range format has
none, since it lays its range over what is cast.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.block_casts import block_units
from runtime.numerics.block_formats import BlockFormat, get_block_format
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import block_lanes, divisor_of_amax, expand_scale, from_lanes
from runtime.numerics.specs import QuantSpec
from runtime.quantize.quantizer import Draw, to_grid
from runtime.quantize.sampling import Sample, channels_as_rows

DRAW = Draw(seed=0x7E1E3E7121, step=0, stream=0)
"""Of stochastic casts that are only looked at."""


@dataclass(frozen=True)
class CastError:
    """What `measure` counted; sums of calls and micro-batches add up."""

    count: float = 0.0
    """Finite and other elements looked at."""
    nonzero: float = 0.0
    underflow: float = 0.0
    overflow: float = 0.0
    saturated: float = 0.0
    square: float = 0.0
    """sum x^2"""
    error: float = 0.0
    """sum (v - x)^2"""
    relative: float = 0.0
    """sum |v - x| / |x|"""

    def __add__(self, other: "CastError") -> "CastError":
        return CastError(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    @property
    def noise(self) -> float | None:
        """sum (v - x)^2 / sum x^2; None of nothing but zeros."""
        return self.error / self.square if self.square else None

    @property
    def sqnr_db(self) -> float | None:
        """Inf of a cast that changes nothing; None of nothing but zeros."""
        return None if self.noise is None else decibels(self.noise)

    def share(self, name: str) -> float:
        """Of underflow, overflow or saturated: part of the elements that are not 0."""
        return float(getattr(self, name)) / self.nonzero if self.nonzero else 0.0

    @property
    def mean_relative(self) -> float | None:
        return self.relative / self.nonzero if self.nonzero else None


def decibels(noise: float) -> float:
    """-10 log10 of a ratio of noise to signal."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


@torch.no_grad()
def measure(sample: Sample, spec: QuantSpec, learned_scale: Tensor | None = None) -> Tensor:
    """The numbers of a CastError, float64 (8,). learned_scale: of a cast whose quantizer has state."""
    values, limits = cast_sample(sample, spec, learned_scale)
    v, x, nonzero = values.double().flatten(), sample.wide, sample.is_nonzero
    if not math.isfinite(sample.largest):
        v = torch.where(sample.part.flatten().isfinite(), v, 0.0)
    error = v - x
    underflow = (v == 0).logical_and_(nonzero).sum()
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    overflow = saturated = zero
    if limits is not None:
        largest, ties = limits
        size = x.abs()
        is_beyond = size > ties
        if isinstance(ties, Tensor):  # a block whose scale is 0 holds nothing but zeros, which is underflow
            is_beyond.logical_and_(ties > 0)
        at = largest * (1 - 2.0**-20)  # where the product of two scales was rounded, the largest value was too
        overflow, saturated = is_beyond.sum(), ((v.abs() >= at) & (v != 0)).sum()
    square, noise = torch.dot(x, x), torch.dot(error, error)
    relative = torch.dot(error.abs_(), sample.inverse)
    count = torch.full_like(zero, x.numel())
    return torch.stack([count, *(n.double() for n in (nonzero.sum(), underflow, overflow, saturated)), square, noise,
                        relative])  # fmt: skip


def cast_sample(
    sample: Sample, spec: QuantSpec, learned_scale: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor | float, Tensor | float] | None]:
    """The values that a cast of the sampled tensor has at the sample, in its shape, and the largest value each could
    have, with the tie beyond it, flat; None where there is no such value.
    """
    part = sample.part
    if spec.is_identity:
        return part, None
    if spec.is_range:
        return sample.take(to_grid(sample.x, None, spec, DRAW)), None
    if spec.is_block:
        return _cast_blocks(sample, spec, get_block_format(spec.format))
    if spec.scale is not None and spec.scale.granularity == "channel":
        matrix, rows = channels_as_rows(sample.x, spec)
        grid, per_row = _cast(matrix, rows, compute_scale(matrix, rows))
        wide = per_row.expand_as(matrix).reshape(sample.x.shape)
        taken = sample.take(grid.reshape(sample.x.shape))
        return taken, _limits(get_format(spec.format), sample.take(wide).double().flatten())
    scale = sample.scale(spec) if learned_scale is None else learned_scale
    values = _cast(part, spec, scale)
    row = get_format(spec.format)
    if scale is None or scale.numel() == 1:
        return values[0], _limits(row, 1.0 if scale is None else float(scale))
    return values[0], _limits(row, values[1].expand_as(part).double().flatten())


def _cast(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values in float64 and the scale as it broadcasts."""
    grid = to_grid(x, scale, spec, DRAW).double()
    if scale is None:
        return grid, grid.new_ones(())
    wide = expand_scale(scale, x.shape, spec)
    return grid * wide.double(), wide


def _limits(row: Format, unit: Tensor | float) -> tuple[Tensor | float, Tensor | float] | None:
    """The largest magnitude and the tie beyond it, times the scale."""
    if row.max > 1e30:  # fp32 and its like: nothing that is finite is beyond
        return None
    return unit * row.max, unit * _tie_beyond(row)


def _tie_beyond(row: Format) -> float:
    """Half a step above the largest value: from there on a value rounds beyond it."""
    if isinstance(row, FloatFormat):
        return row.max + 2.0 ** (row.emax - row.mantissa - 1)
    return row.max + 0.5 if isinstance(row, IntFormat) else (row.max + row.beyond_max) / 2


def _cast_blocks(
    sample: Sample, spec: QuantSpec, row: BlockFormat
) -> tuple[Tensor, tuple[Tensor | float, Tensor | float]]:
    """A two-level format scales by the largest of the tensor: a run that holds it is cast beside the sample."""
    part, num_runs, is_two_level = sample.part, sample.part.shape[0] if sample.part.dim() else 1, spec.has_scale
    if is_two_level and sample.runs is not None:
        if not math.isfinite(sample.largest):
            whole = Sample(sample.x, sample.x, None, sample.largest)
            values, (largest, ties) = _cast_blocks(whole, spec, row)
            shaped = [each.reshape(sample.x.shape) for each in (largest, ties) if isinstance(each, Tensor)]
            taken = [sample.take(each).flatten() for each in shaped]
            return sample.take(values), (taken[0], taken[1])
        more = part.new_zeros((1, *part.shape[1:]))
        more[0, 0, 0] = sample.largest
        part = torch.cat([part, more])
    grid = to_grid(part, None, spec, DRAW).double()
    if is_two_level:
        finite = part.float() if math.isfinite(sample.largest) else None
        amax = finite.abs().amax() if finite is not None else None
        scale = 1.0 / divisor_of_amax(amax) if amax is not None else _scale_of(part, spec)
        grid = grid * scale.double()
    units = from_lanes(block_units(block_lanes(part, spec.along), row), part.shape, spec.along)
    units = units[:num_runs].flatten() if part.dim() else units.flatten()
    element = get_format(row.element)
    unit_max, unit_tie = element.max, _tie_beyond(element)
    return grid[:num_runs] if part.dim() else grid, (units * unit_max, units * unit_tie)


def _scale_of(x: Tensor, spec: QuantSpec) -> Tensor:
    scale = compute_scale(x, spec)
    assert scale is not None
    return scale
