"""Scaling: a loss times S going into backward, gradients over S coming out, and the overflow of any rank stopping all.

loss * S -> backward -> hook on every parameter: g / S, and is g finite? -> reduction, clipping, update

Where it began is told by layer and role: a cast of a gradient beyond its format, or a gradient that is not finite.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.training.world import World
from lpcompile.api import run_state
from runtime.optim.loss_scale import LossScale


@dataclass(frozen=True)
class StepSums:
    """What all ranks know of a step together, the same on each."""

    loss: float  # mean over ranks and micro-batches, nats per token
    is_nonfinite: bool  # a gradient held NaN or Inf
    is_saturated: bool  # a gradient operand exceeded its format's maximum
    overflowed: str = ""  # where first: "rank 1: h.0.mlp.fc bwd"; "" if nothing did

    def must_skip(self, scale: LossScale) -> bool:
        """Gradients that are not finite are never applied; saturated ones are dropped where backing off can cure it."""
        return self.is_nonfinite or (self.is_saturated and scale.is_dynamic)


class GradientUnscaler:
    """Hooks on the parameters of a model; independent of the engine, as they run before a gradient is accumulated."""

    def __init__(self, model: nn.Module, scale: LossScale, world: World) -> None:
        self._scale, self._model, self._world = scale, model, world
        self._is_bad = torch.zeros((), dtype=torch.bool, device=world.device)
        if (state := run_state(model)) is not None:
            state.is_scaled = True
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._unscale, name.rpartition(".")[0]))

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self._scale.value

    def gather(self, loss: Tensor) -> StepSums:
        """One small all-reduce per step: the mean loss, and what overflowed on any rank since the last call."""
        state = run_state(self._model)
        saturated = bool(state and state.overflow)
        sums = torch.stack([loss.double(), self._is_bad.double(), self._is_bad.new_tensor(saturated).double()])
        dist.all_reduce(sums)
        mean, bad, saturated_ranks = sums.tolist()
        first = self._first() if bad > 0 or saturated_ranks > 0 else ""
        self._is_bad.zero_()
        if state:
            state.clear_overflow()
        return StepSums(mean / self._world.size, bad > 0, saturated_ranks > 0, first)

    def _first(self) -> str:
        """Where it began, on the first rank on which it did."""
        state = run_state(self._model)
        places = self._world.gathered(state.overflowed.first() if state else "")
        found = [f"rank {rank}: {place}" if len(places) > 1 else place for rank, place in enumerate(places) if place]
        return found[0] if found else ""

    def _unscale(self, site: str, gradient: Tensor) -> Tensor:
        is_bad = ~torch.isfinite(gradient).all()
        self._is_bad |= is_bad
        if (state := run_state(self._model)) is not None:
            state.overflowed.note(bool(is_bad) if is_bad.is_cpu else is_bad, site, "grad")
        return gradient if self._scale.value == 1.0 else gradient * (1.0 / self._scale.value)
