"""Block states: a moment as codes of few bits and one scale a block of neighbours.

    e4m3/128           q = e4m3(x / s), s = amax of the block / 448, fp32 (FP8-LM, arXiv 2310.18313, has one a tensor)
    e4m3/128/expand    the same of y = (|x| / c)^k, k as large as the format's range allows (COAT, ICLR 2025)
    dynamic8/256       the nearest of 256 values in [-1, 1] of x / amax (Dettmers et al., ICLR 2022, section 1.3)
    dynamic4/128       likewise of 16, two a byte (Li et al., NeurIPS 2023: variance linear from 1/16 to 1)

A block is of the whole parameter's flat elements, from its first one on: shards have the blocks of the whole.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.numerics import decode, encode
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.optim.block_names import TABLES, BlockState
from runtime.optim.places import Run
from runtime.optim.power import power

STEPS = 16
"""k is a multiple of 1/16, as in COAT's code."""


class Layout:
    """Where the elements of one rank lie in the blocks of a whole parameter, and what ranks tell each other of them.

    `runs` with offsets in the parameter, `count` elements of it. `groups`: those among which they are cut.
    """

    def __init__(self, runs: list[Run], count: int, block: int, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        self.block, self.blocks, self.groups = block, blocks_of(count, block), groups
        self.size = sum(run.size for run in runs)
        self.is_whole = self.size == count
        self._runs = runs

    @cached_property
    def ids(self) -> Tensor:
        """The block of each element here."""
        places = [torch.arange(offset, offset + size) for _, size, offset in self._runs]
        return torch.cat(places) // self.block if places else torch.zeros(0, dtype=torch.int64)

    def spread(self, per_block: Tensor) -> Tensor:
        """A number of each block, for each element here."""
        if self.is_whole:
            return per_block.repeat_interleave(self.block)[: self.size]
        return per_block[self.ids.to(per_block.device)]

    def extremes(self, values: Tensor) -> Tensor:
        """(2, blocks): the largest and the smallest magnitude but 0 of the finite values of each block, over all ranks;
        0 and Inf of a block that has none.
        """
        sizes = values.abs()
        most = torch.where(sizes.isfinite(), sizes, 0.0)
        least = torch.where(most > 0, most, math.inf)
        if self.is_whole:
            missing = self.blocks * self.block - self.size
            most = torch.nn.functional.pad(most, (0, missing)).view(-1, self.block).amax(1)
            least = torch.nn.functional.pad(least, (0, missing), value=math.inf).view(-1, self.block).amin(1)
            return torch.stack((most, least))
        found = values.new_zeros(self.blocks), values.new_full((self.blocks,), -math.inf)
        for into, what in zip(found, (most, -least)):
            into.scatter_reduce_(0, self.ids.to(values.device), what, "amax")
        both = torch.stack(found)
        for group in self.groups:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        return torch.stack((both[0], -both[1]))


def blocks_of(count: int, block: int) -> int:
    """How many blocks `count` elements make."""
    return -(-count // block)


class Place(NamedTuple):
    """A state: its dtype, and how many numbers it has; None: one, or a pair, for each element of the parameter."""

    dtype: torch.dtype
    size: int | None = None
    is_paired: bool = False

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Of the state of a parameter, or of its shard."""
        if self.size is not None:
            return (self.size,)
        return (*parameter.shape, 2) if self.is_paired else tuple(parameter.shape)


def states_of(name: str, state: BlockState, count: int) -> dict[str, Place]:
    """What is kept of a moment `name` of `count` elements."""
    blocks = blocks_of(count, state.block)
    kept = {
        name: Place(torch.uint8, None if state.bits == 8 else (count + 1) // 2),
        f"{name}_scale": Place(torch.float32, blocks),
    }
    if state.is_expanded:
        kept |= {f"{name}_center": Place(torch.float32, blocks), f"{name}_power": Place(torch.uint8, blocks)}
    return kept


def encoded(
    values: Tensor, state: BlockState, layout: Layout, is_signed: bool, on_grid: Callable[[Tensor, str], Tensor]
) -> list[Tensor]:
    """Flat fp32 values as what `states_of` names. `on_grid` rounds to a scalar format as the optimizer does; a table is
    rounded to nearest. Inf saturates; NaN stays NaN, and of a table NaN or Inf makes its block NaN.
    """
    extremes = layout.extremes(values)
    if state.element in TABLES:
        scale = torch.where(extremes[0] > 0, extremes[0], 1.0)
        bad = layout.extremes(torch.where(values.isfinite(), 0.0, 1.0))[0] > 0
        y, scale = values / layout.spread(scale), torch.where(bad, math.nan, scale)
        codes = table_codes(y, table_of(state.element, is_signed).to(y.device))
        return [packed(codes) if state.bits == 4 else codes, scale]
    if not state.is_expanded:
        scale = float_scale(extremes, state.element)
        return [encode(on_grid(values / layout.spread(scale), state.element), state.element), scale]
    scale, center, steps = expansion(extremes, state.element)
    sizes, spread = values.double().abs(), layout.spread
    grown = power(sizes / spread(center).double(), spread(steps).double() / STEPS) / spread(scale).double()
    y = torch.where(sizes.isfinite(), grown, sizes).float().copysign(values)
    return [encode(on_grid(y, state.element), state.element), scale, center, steps]


def decoded(kept: list[Tensor], state: BlockState, layout: Layout, is_signed: bool) -> Tensor:
    """The fp32 values of what `encoded` gave."""
    codes, scale = kept[0], layout.spread(kept[1])
    if state.element in TABLES:
        codes = unpacked(codes, layout.size) if state.bits == 4 else codes
        return table_of(state.element, is_signed).to(codes.device)[codes.int()] * scale
    values = decode(codes, state.element)
    if not state.is_expanded:
        return values * scale
    center, steps = layout.spread(kept[2]).double(), layout.spread(kept[3]).double()
    sizes = power(values.double().abs() * scale.double(), STEPS / steps) * center
    return torch.where(values.isnan(), values, sizes.float().copysign(values))


def float_scale(extremes: Tensor, element: str) -> Tensor:
    """amax / largest value of the format, fp32; 1 of a block of zeros."""
    scale = extremes[0] / get_format_max(element)
    return torch.where(scale > 0, scale, 1.0)


def expansion(extremes: Tensor, element: str) -> tuple[Tensor, Tensor, Tensor]:
    """(s, c, 16 k) of blocks whose largest and smallest magnitude are given: fp32, fp32, uint8.

    c = sqrt(max min), k = floor(16 log2(top^2 / 2) / log2(max / min)) / 16 within [1/16, 15], s = (max / c)^k / top,
    and top the format's largest value.
    Zeros do not count as smallest (COAT adds 1e-20 to both, so that one zero makes k less than 1/3).
    """
    most, least = extremes.double()
    is_empty = most <= 0
    most, least = torch.where(is_empty, 1.0, most), torch.where(is_empty, 1.0, least)
    largest = get_format_max(element)
    center = (most.sqrt() * least.sqrt()).float()
    center = torch.where(center > 0, center, torch.finfo(torch.float32).tiny)
    steps = (STEPS * math.log2(largest**2 / 2) / (most / least).log2()).floor()
    steps = torch.where(steps.isfinite(), steps, 240.0).clamp(1, 240)
    scale = (power(most / center.double(), steps / STEPS) / largest).float()
    return scale, center, steps.to(torch.uint8)


def get_format_max(element: str) -> float:
    """The largest value of a float format."""
    row = get_format(element)
    assert isinstance(row, FloatFormat)
    return float(row.max)


@lru_cache(maxsize=8)
def table_of(element: str, is_signed: bool) -> Tensor:
    """The values of a table in [-1, 1] ([0, 1] unsigned), increasing, fp32.

    dynamic: in each decade 10^-i .. 10^(1-i) half as many values as in the one above, at the middles of equal parts of
    0.1 .. 1, and 0 and 1. The unsigned one of 4 bits has no 0: 1/16, 2/16 .. 1.
    """
    bits = TABLES[element]
    if bits == 4 and not is_signed:
        return torch.arange(1, 17, dtype=torch.float32) / 16
    decades = bits - 1
    values = [0.0, 1.0]
    for number in range(decades):
        parts = 2 ** (number + (0 if is_signed else 1))
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = (10.0 ** (number - decades + 1) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += middles + ([-each for each in middles] if is_signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64).float()


def table_codes(y: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest value, uint8; of a tie the lower one. NaN: the last."""
    return torch.bucketize(y, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the low half."""
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return codes[:, 0] | codes[:, 1] << 4


def unpacked(bytes_: Tensor, count: int) -> Tensor:
    """The `count` codes that `packed` packed."""
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=1).view(-1)[:count]
