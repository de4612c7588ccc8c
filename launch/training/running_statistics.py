"""Running statistics: the means and variances that batch norms keep are the same on every rank after every step.

Each rank normalizes by the statistics of its own micro-batch, as DDP and DeepSpeed have it, so a batch of W ranks is W
batches to a batch norm. What it keeps for evaluation would then differ from rank to rank (DDP takes rank 0's before
the next forward, DeepSpeed leaves them apart): they are averaged instead, one small all-reduce a step. Of independent
pictures the mean of the ranks' variances estimates what the variance of all would. A skipped step leaves them as they
were, for a forward that overflowed has put Inf in.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from launch.training.world import World


class RunningStatistics:
    """Those of a model; nothing to do where it has none."""

    def __init__(self, model: nn.Module, world: World) -> None:
        norms = [each for each in model.modules() if isinstance(each, _BatchNorm)]
        self._of_norms = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
        self._counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._world, self._before = world, list[Tensor]()

    @torch.no_grad()
    def keep(self) -> None:
        """Call it before the first forward of a step."""
        self._before = [each.clone() for each in (*self._of_norms, *self._counts)]

    @torch.no_grad()
    def agree(self, skip: bool) -> None:
        """Call it after the last: on all ranks, with the same `skip`."""
        if skip:
            for each, before in zip((*self._of_norms, *self._counts), self._before, strict=True):
                each.copy_(before)
        elif self._of_norms and self._world.size > 1:
            all_of_them = torch.cat([each.flatten().double() for each in self._of_norms])
            dist.all_reduce(all_of_them)
            parts = (all_of_them / self._world.size).split([each.numel() for each in self._of_norms])
            for each, part in zip(self._of_norms, parts, strict=True):
                each.copy_(part.view_as(each))
