"""LossScaler: torch.amp.GradScaler for a compiled model. It takes its numbers from the policy, and knows of overflow
that saturated.

    scaler = LossScaler(model)
    scaler.scale(loss).backward()
    scaler.step(optimizer)          # unscales; leaves the weights alone after an overflow on any rank
    scaler.update()

A gradient operand beyond its format's largest value saturates, so no gradient shows Inf, and GradScaler would let the
scale grow for ever. Here the flag that the casts set (runtime/state.py) counts as Inf does.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lpcompile.compiled import get_compiled
from lpcompile.errors import LpError
from runtime.optim.loss_scale import MAX_SKIPS
from runtime.quantize.observed.end_step import drop_seen


class LossScaler(torch.amp.GradScaler):
    """GradScaler of the `loss_scale` section of a compiled model's policy; kind `none` scales nothing.

    Stands wherever a GradScaler does: `accelerator.scaler = LossScaler(model)` before accelerator.prepare;
    `trainer.accelerator.scaler` of transformers' Trainer. static: the scale stays, and steps with Inf or NaN are
    skipped; dynamic: saturated steps are too, and the scale backs off to no less than `min`. With torch.distributed
    each step has one all-reduce of a number in `group`, so that all ranks skip the same steps. Raises LpError for a
    model that was not compiled.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        compiled = get_compiled(model)
        rule = compiled.policy.loss_scale
        parameter = next(model.parameters(), None)
        super().__init__(
            "cpu" if parameter is None else parameter.device.type,
            init_scale=rule.init,
            growth_factor=rule.growth,
            backoff_factor=rule.backoff,
            growth_interval=rule.interval,
            enabled=rule.kind != "none",
        )
        self._is_dynamic, self._minimum = rule.kind == "dynamic", rule.min
        self._state, self._group = compiled.state, group
        self._overflow: Tensor | None = None
        self._found: list[Tensor] = []
        self._num_skipped = 0
        self._state.is_scaled = True

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        found: dict[torch.device, Tensor] = super()._unscale_grads_(*args, **kwargs)
        for device, is_inf in found.items():
            is_inf.copy_(self._anywhere(is_inf).to(device))
        self._found += found.values()
        return found

    def _anywhere(self, is_inf: Tensor) -> Tensor:
        """1 where a gradient of this optimizer is not finite, or an operand overflowed since `update`, on any rank."""
        if self._overflow is None:
            seen = self._state.overflow if self._is_dynamic else False
            self._overflow = torch.as_tensor(seen, dtype=torch.float32, device=is_inf.device).clone()
        either = torch.maximum(is_inf, self._overflow.to(is_inf.device))
        if dist.is_initialized() and dist.get_world_size(self._group) > 1:
            dist.all_reduce(either, op=dist.ReduceOp.MAX, group=self._group)
        return either

    def _count_skip(self) -> None:
        scale = self.get_scale()
        self._num_skipped += not self._is_dynamic or scale <= self._minimum
        if self._num_skipped >= MAX_SKIPS:
            raise LpError(
                f"the last {MAX_SKIPS} steps were all skipped because their gradients overflowed, and the loss scale "
                "can go no lower",
                where="LossScaler.update",
                got=f"loss scale {scale:g}, overflow first in {self._state.overflowed.first() or 'no layer'}",
                hint="a smaller learning rate, a dynamic loss_scale in the policy, or formats with a wider range",
            )

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Back off, grow, or stay, and forget the overflow. LpError where the last 32 steps were all skipped and the
        scale can go no lower; it names the layer and role that overflowed first, on this rank.
        """
        if any(bool(each) for each in self._found):
            drop_seen(self._state.quantizers)
            self._count_skip()
        else:
            self._num_skipped = 0
        self._found = []
        if self._enabled and not self._is_dynamic and new_scale is None:
            new_scale = self._scale
        super().update(new_scale)
        if self._enabled and self._is_dynamic and self._scale is not None:
            self._scale.clamp_(min=self._minimum)
        self._state.clear_overflow()
        self._overflow = None
