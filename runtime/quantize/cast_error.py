"""Cast error: what a cast does to a tensor, counted on a sample of it.

    values v = grid * scale of x         underflow   x != 0 and v == 0
                                         overflow    |x| beyond the format's largest value under its scale, rounded
                                         saturated   v is that largest value
    SQNR = 10 log10(sum x^2 / sum (v - x)^2) dB        relative error = mean |v - x| / |x| over x != 0

v is in fp32, as runtime.numerics.quantize gives it (float64 for float64 x); sums are in float64. What is not finite, or
becomes so with its block or range, adds no error. Casts draw no bits of a model's streams: stochastic rounding has a
key of its own here. In a block format the largest value is that of an element under the scale of its block; a range
format has none, since it lays its range over what is cast.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.block_casts import block_units
from runtime.numerics.block_formats import BlockFormat, get_block_format
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat
from runtime.numerics.formats import get_format
from runtime.numerics.hadamard import rotate_back, signs_of
from runtime.numerics.scaling import block_lanes, expand_scale, from_lanes
from runtime.numerics.specs import QuantSpec, Rounding
from runtime.quantize.quantizer import Draw, to_grid
from runtime.quantize.sampling import Sample, channels_as_rows
from runtime.quantize.stateless import quantizer_of

_ROUNDED = 1 - 2.0**-20
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
def measure(sample: Sample, casts: Sequence[QuantSpec], learned: Sequence[Tensor | None] | None = None) -> Tensor:
    """The numbers of a CastError for each cast, float64 (casts, 8). learned: the scales of those whose quantizers have
    state, None of the others.
    """
    if not casts or not sample.part.numel():
        return torch.zeros((len(casts), 8), dtype=torch.float64, device=sample.x.device)
    counts: list[Tensor] = []
    sums: list[Tensor] = []
    for spec, scale in zip(casts, learned or [None] * len(casts)):
        laid = sample.laid(spec.along)  # sums do not ask for the order of elements
        values, (beyond, saturated) = _cast(laid, spec, scale)
        flat = values.flatten()
        if not math.isfinite(sample.largest):
            flat = torch.where(flat.isfinite() & laid.part.flatten().isfinite(), flat, laid.wide)
        underflow = (flat == 0).logical_and_(laid.is_nonzero).count_nonzero()
        error = torch.sub(flat, laid.wide)
        exact = error.double()
        counts += underflow, beyond, saturated
        sums += torch.dot(exact, exact), torch.dot(error.abs_(), laid.inverse).double()
    number, nonzero, square = (each.expand(len(casts)) for each in sample.totals)
    by_cast = *torch.stack(counts).double().view(-1, 3).unbind(1), *torch.stack(sums).view(-1, 2).unbind(1)
    underflow, beyond, saturated, noise, relative = by_cast
    return torch.stack([number, nonzero, underflow, beyond, saturated, square, noise, relative], dim=1)


class Cast(NamedTuple):
    """Values at the sample, in its shape, and how many elements overflow, and saturate: float64 ()."""

    values: Tensor
    counts: tuple[Tensor, Tensor]


def cast_sample(sample: Sample, spec: QuantSpec, learned_scale: Tensor | None = None) -> Tensor:
    """The values that a cast of the sampled tensor has at the sample, in its shape."""
    laid = sample.laid(spec.along)
    values = _cast(laid, spec, learned_scale).values
    if laid is sample:
        return values.reshape(sample.part.shape)
    lanes = block_lanes(sample.part, spec.along).shape
    return from_lanes(values.reshape(lanes), sample.part.shape, spec.along)


def _cast(sample: Sample, spec: QuantSpec, learned_scale: Tensor | None) -> Cast:
    """Of a sample that is laid along the blocks of the cast."""
    part = sample.part
    if spec.is_identity:
        return Cast(part, sample.none)
    if spec.transform is not None or (spec.is_block and _needs_all(get_block_format(spec.format))):
        return Cast(sample.take(_cast_all(sample.x, spec)), sample.none)
    if spec.is_range:
        return Cast(sample.take(to_grid(sample.x, None, spec, DRAW)), sample.none)
    if spec.is_block:
        return _cast_blocks(sample, spec, get_block_format(spec.format))
    row = get_format(spec.format)
    if spec.scale is not None and spec.scale.granularity == "channel":
        matrix, rows = channels_as_rows(sample.x, spec)
        scale = compute_scale(matrix, rows)
        assert scale is not None
        values = sample.take((_wide(to_grid(matrix, scale, rows, DRAW)) * scale).reshape(sample.x.shape))
        unit = sample.take(scale.expand_as(matrix).reshape(sample.x.shape))
        return Cast(values, _count(sample, part, values, unit * row.max, unit * _tie_beyond(row)))
    scale = sample.scale(spec) if learned_scale is None else learned_scale
    values = _wide(to_grid(part, scale, spec, DRAW))
    if scale is None or scale.numel() == 1:
        unit_size = 1.0 if scale is None else float(scale)
        values = values if scale is None else values * scale
        return Cast(values, _count(sample, part, values, unit_size * row.max, unit_size * _tie_beyond(row)))
    unit = expand_scale(scale, part.shape, spec)
    values = values * unit
    return Cast(values, _count(sample, part, values, unit * row.max, unit * _tie_beyond(row)))


def _needs_all(row: BlockFormat) -> bool:
    """Whether a block's scale follows from more than its largest element."""
    return row.is_square or row.rule in ("four_six", "eden")


def _cast_all(x: Tensor, spec: QuantSpec) -> Tensor:
    """The values of a cast of all of x, turned back where it was turned."""
    made = quantizer_of(spec).cast(x, DRAW)
    values = _wide(made.grid) if made.scale is None else _wide(made.grid) * made.scale
    if spec.transform is None:
        return values
    signs = signs_of(spec.transform, seed=DRAW.seed, step=DRAW.step, stream=DRAW.signs, device=x.device)
    return rotate_back(values, spec, signs)


def _wide(grid: Tensor) -> Tensor:
    return grid if grid.dtype in (torch.float32, torch.float64) else grid.float()


def _count(
    sample: Sample, x: Tensor, values: Tensor, largest: Tensor | float, ties: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Elements beyond the tie that follows the largest value, and values that are the largest. Where the product of two
    scales was rounded, the largest value was too.
    """
    if isinstance(largest, float) or isinstance(ties, float):
        if sample.largest < largest * _ROUNDED:
            return sample.none
        saturated = (values.abs() >= largest * _ROUNDED).count_nonzero()
        return sample.none[0] if sample.largest <= ties else (x.abs() > ties).count_nonzero(), saturated
    # a block whose scale is 0 holds nothing but zeros, which is underflow
    near, beyond = (torch.where(each > 0, each, torch.inf) for each in (largest * _ROUNDED, ties))
    return (x.abs() > beyond).count_nonzero(), (values.abs() >= near).count_nonzero()


def _tie_beyond(row: Format) -> float:
    """Half a step above the largest value: from there on a value rounds beyond it. Inf of fp32 and its like."""
    if row.max > 1e38:
        return math.inf
    if isinstance(row, FloatFormat):
        return row.max + 2.0 ** (row.emax - row.mantissa - 1)
    return row.max + 0.5 if isinstance(row, IntFormat) else (row.max + row.beyond_max) / 2


def _cast_blocks(sample: Sample, spec: QuantSpec, row: BlockFormat) -> Cast:
    """A two-level format scales by the largest of the tensor, which is put into a row of its own beside the sample."""
    if not math.isfinite(sample.largest) and spec.has_scale:  # the largest is that of the other blocks
        scale = compute_scale(sample.all_laid(spec.along), replace(spec, along="row"))
        assert scale is not None
        largest = get_block_format(spec.format).block_max * float(scale)
    else:
        largest = sample.largest
    matrix = seen = sample.part.reshape(-1, sample.part.shape[-1] if sample.part.dim() else 1)
    if spec.has_scale:
        more = matrix.new_zeros((1, matrix.shape[1]))
        more[0, 0] = largest
        matrix = torch.cat([matrix, more])
    grid = _wide(to_grid(matrix, None, replace(spec, along="row"), DRAW))[: seen.shape[0]]
    units, divisor = block_units(sample.block_amax(row.block), row, largest, _round_fast)
    values = grid if divisor is None else grid * (1.0 / divisor)
    units = units.to(values.dtype).unsqueeze(-1)
    element = get_format(row.element)
    limits = units * element.max, units * _tie_beyond(element)
    return Cast(values, _count(sample, _in_blocks(seen, row), _in_blocks(values, row), *limits))


def _round_fast(x: Tensor, row: Format, rounding: Rounding, *_: Any) -> Tensor:
    """The scales of blocks on their grid, by the kernel of casts."""
    return to_grid(x, None, QuantSpec(row.name, rounding), DRAW).float()


def _in_blocks(matrix: Tensor, row: BlockFormat) -> Tensor:
    """(rows, blocks, elements), what a ragged block lacks 0."""
    if ragged := -matrix.shape[1] % row.block:
        matrix = pad(matrix, (0, ragged))
    return (
        matrix.view(matrix.shape[0], -1, row.block) if matrix.is_contiguous() else matrix.unflatten(1, (-1, row.block))
    )
