"""Topology: by which steps a sum over ranks is made. The exchange runs the steps, the ledger counts their bytes.

    flat, all-reduce       W = 1   nothing
                           W = 2   Gather, summed by all                 one rounding
                           W > 2   Scatter, then Gather                  two roundings
    flat, reduce-scatter           Scatter                               one rounding

Scatter: cut what there is into one part for each rank, send each its part, sum what arrives. Gather: send what there is
to all; either every rank sums it, or, after a Scatter, the parts of all stand side by side.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from runtime.errors import WireError

StepName = Literal["scatter", "gather", "gather_and_sum"]


@dataclass(frozen=True)
class Step:
    """One collective among the ranks of a group."""

    name: StepName
    world: int
    """Ranks that take part."""
    group: dist.ProcessGroup | None = None
    """Which; None: all."""


class Topology(ABC):
    """How the ranks that share gradients are joined."""

    @property
    @abstractmethod
    def world(self) -> int:
        """Ranks in all."""

    @abstractmethod
    def all_reduce(self) -> tuple[Step, ...]:
        """The steps after which every rank has the whole sum."""


@dataclass(frozen=True)
class Flat(Topology):
    """Every rank is as near as every other."""

    size: int
    group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return self.size

    def all_reduce(self) -> tuple[Step, ...]:
        if self.size == 1:
            return ()
        if self.size == 2:
            return (Step("gather_and_sum", 2, self.group),)
        return Step("scatter", self.size, self.group), Step("gather", self.size, self.group)


def flat(group: dist.ProcessGroup | None = None) -> Flat:
    """The ranks of a group, all for None; one without torch.distributed. WireError if this rank is not in it."""
    if not dist.is_initialized():
        return Flat(1, group)
    if (world := dist.get_world_size(group)) < 1:
        raise WireError("this rank is not in the process group", hint="calling the collective on its members only")
    return Flat(world, group)
