"""Delayed scaling: the scale of a step is made from the largest magnitudes of the steps before it.

    scale = fp32(m / max(format)) 2^margin       m: the largest of the last `history` steps, or that of the last one

NVIDIA Transformer Engine, DelayedScaling (its scale is 1 / ours): a history of (2, 8, 4) in e4m3 gives 8 / 448. Where
m is 0 the old scale stays. A step in which the site was not reached, or cast nothing but NaN and Inf, is none.
"""

import math

import torch
from torch import Tensor

from runtime.numerics.quantizer_specs import DelayedSpec
from runtime.numerics.scaling import MAX_SCALE, MIN_SCALE
from runtime.numerics.specs import QuantSpec
from runtime.quantize.observed.quantizer import Observed


class Delayed(Observed):
    """`amax_history` (history,): of each step, the last one first."""

    kind = "delayed"
    amax_history: Tensor

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__(spec, owner, is_weight)
        assert isinstance(spec.quantizer, DelayedSpec)
        self.register_buffer("amax_history", torch.zeros(spec.quantizer.history))

    def present(self, x: Tensor) -> Tensor:
        rule = self.rule
        assert isinstance(rule, DelayedSpec)
        scale = super().present(x)
        return (scale * 2.0**rule.margin).clamp(max=MAX_SCALE) if rule.margin else scale

    def end_step(self, amax: float) -> str:
        rule, history = self.rule, self.amax_history
        assert isinstance(rule, DelayedSpec)
        if rule.history > 1:
            history.copy_(history.roll(1))
        history[0] = amax
        largest = amax if rule.algorithm == "most_recent" else float(history.max())
        if largest > 0:
            scale = math.ldexp(largest / self.largest, rule.margin)
            self.put_in_force(min(max(scale, MIN_SCALE), MAX_SCALE))
        return ""
