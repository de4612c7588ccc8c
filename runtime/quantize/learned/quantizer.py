"""Learned: what quantizers that learn one scale have in common; each kind is a file beside this one.

    q = round(clip(x / s, low, high)),  x^ = s q           low, high: the format's ends; s > 0, fp32, follows from state

A quantizer is a module: its call looks at x and gives s, differentiable in its parameter, so that the hooks by which
ZeRO-3 and FSDP gather parameters run. `carrier` then carries the gradient of x^ to x and to s.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from runtime.numerics.cast_parts import QuantizerKind
from runtime.numerics.formats import get_format
from runtime.numerics.specs import QuantSpec
from runtime.quantize.qtensor import CastKey
from runtime.quantize.quantizer import AbstractQuantizer


class Learned(nn.Module, AbstractQuantizer):
    """One operand of one site. `owner` is its name, SITE.x or SITE.w; `is_weight`: what it casts is a parameter."""

    kind: ClassVar[QuantizerKind]
    """By which a policy names it."""
    has_residual = False
    """Whether the derivative in the scale counts, between the ends, what rounding moved: round(x / s) - x / s."""

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__()
        assert spec.quantizer is not None
        self.spec, self.owner, self.is_weight = spec, owner, is_weight
        row = get_format(spec.format)
        self.low, self.high = float(row.min), float(row.max)

    @property
    def key(self) -> CastKey:
        return CastKey(self.spec, self.owner, sum(each._version for each in (*self.parameters(), *self.buffers())))

    @abstractmethod
    def step(self) -> Tensor:
        """The scale, fp32 (), differentiable in the parameter."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """As before anything was learned."""

    def forward(self, x: Tensor) -> Tensor:
        """The scale with which x is cast."""
        self.observe(x)
        return self.step()

    def scale(self, x: Tensor) -> Tensor:
        return self.step().detach()

    def carrier(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """x, with the derivatives of x^ in x and in the scale. `step`: what the call gave."""
        step = self.step() if step is None else step
        ends = (self.low, self.high)
        result: Tensor = _Carrier.apply(x, step, *ends, self.has_residual, self.gradient_scale(x))
        return result

    def gradient_scale(self, x: Tensor) -> float:
        """The factor on the gradient of the scale."""
        return 1.0

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module; but a checkpoint of the uncompiled model, which has nothing of this, is complete."""
        given = (state_dict, prefix, local_metadata, strict)
        super()._load_from_state_dict(*given, [], unexpected_keys, error_msgs)


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: float, high: float, has_residual: bool, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.given = low, high, has_residual, gradient_scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        low, high, has_residual, gradient_scale = ctx.given
        v = x.float() / step
        if has_residual:  # both ends belong to the clip
            is_low, is_high = v <= low, v >= high
            slope = torch.where(is_low, low, torch.where(is_high, high, v.round() - v))
        else:  # the lower end is x's where it is 0, as in a relu that is not flat at 0
            is_low, is_high = (v < low if low == 0 else v <= low), v >= high
            slope = is_high * high + is_low * low
        dx = dstep = None
        if ctx.needs_input_grad[0]:
            dx = dy.masked_fill(is_low | is_high, 0.0)
        if ctx.needs_input_grad[1]:
            dstep = ((dy.float() * slope).sum() * gradient_scale).reshape(step.shape)
        return dx, dstep, None, None, None, None


def at_least(value: Tensor, floor: Tensor) -> Tensor:
    """max(value, floor), whose gradient stops only where it would push a value at the floor further down."""
    return _AtLeast.apply(value, floor)


class _AtLeast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(value <= floor)
        return torch.maximum(value, floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (is_at_floor,) = ctx.saved_tensors
        return torch.where(is_at_floor & (d > 0), torch.zeros_like(d), d), None


LEAST = 2.0**-10
"""A scale stays above this part of what it began as, whatever the optimizer does."""
