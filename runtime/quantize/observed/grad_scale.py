"""GradScale: per layer a power of two s by which a gradient is multiplied, so that it fills the range of its format.

    grid = round(s dy),  value = grid / s                     `in_force` is 1 / s, by which values are divided

    max-align   amax of s dy above the format's largest value: s / 2; not above half of it: 2 s. Begins where exact is.
    exact       s = 2^floor(log2(max / amax)) of the present gradient: the scale rule pow2, bit for bit
    dalle       s = 2^floor(l), l begins at log2(M 2^13); up by 1/1000 after a step in which next to nothing saturated,
                down by 1/2 after one in which it did, not twice within 125 steps; between M 2^7 and M 2^24, M ranks

Sun et al., Ultra-Low Precision 4-bit Training, NeurIPS 2020, has a trainable scale per layer; its rule was not found.
max-align is one reading of it (another divides by 4); dalle is published (Ramesh et al., arXiv 2102.12092, appendix D,
whose authors name Sun et al. as similar). There the scale is no power of two, it backs off where fp16 overflows, and
the block's own update is left out then; here the radix-4 grid wants powers of two, and what saturates is applied.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.numerics.quantizer_specs import GradScaleSpec
from runtime.numerics.specs import QuantSpec
from runtime.quantize.observed.quantizer import Observed

LEAST, MOST = -126, 126
"""Exponents of s: those of fp32, which 8 bits hold."""
_SHARE = 1e-5
"""dalle: of the elements that a step may saturate (FP8-LM's number, arXiv 2310.18313); of DALL-E there is none."""
_FIRST, _LOW, _HIGH, _PAUSE = 13, 7, 24, 125


class GradScale(Observed):
    """`exponent` (): log2 s, which dalle moves by fractions; `pause` (): dalle's steps until it may back off again."""

    kind = "grad-scale"
    first_rule = "pow2"
    exponent: Tensor
    pause: Tensor

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__(spec, owner, is_weight)
        self.register_buffer("exponent", torch.zeros((), dtype=torch.float64))
        self.register_buffer("pause", torch.zeros(()))
        self._has_saturated = False
        self._is_told = False

    @property
    def is_waiting(self) -> bool:
        return self.how == "max-align" and super().is_waiting

    @property
    def how(self) -> str:
        """The rule's name."""
        assert isinstance(self.rule, GradScaleSpec)
        return self.rule.rule

    def present(self, x: Tensor) -> Tensor:
        if self.how != "dalle":
            return super().present(x)
        return torch.full((), 2.0 ** -(_FIRST + _ranks()), device=x.device).float()

    def note(self, x: Tensor, amax: Tensor) -> None:
        super().note(x, amax)
        if self.how == "dalle":
            beyond = (x.detach().abs() > self.largest * self.scale(x)).sum()
            self._has_saturated = self._has_saturated or int(beyond) > _SHARE * x.numel()

    def drop_seen(self) -> None:
        super().drop_seen()
        self._has_saturated = False

    def end_step(self, amax: float) -> str:
        if self.how == "exact" or (amax == 0 and not self._is_set):
            return ""
        before = float(self.exponent) if self._is_set else self._first(amax)
        wanted = self._aligned(before, amax) if self.how == "max-align" else self._moved(before)
        low, high = (LEAST, MOST) if self.how == "max-align" else (_LOW + _ranks(), _HIGH + _ranks())
        kept = min(max(wanted, low), high)
        self.exponent.fill_(kept)
        self.put_in_force(2.0 ** -math.floor(kept))
        self._has_saturated = False
        diverged, self._is_told = wanted != kept and not self._is_told, wanted != kept
        return f"its scale would be 2^{wanted:g}, and stays at its end 2^{kept:g}" if diverged else ""

    @property
    def _is_set(self) -> bool:
        return float(self.in_force) > 0

    def _first(self, amax: float) -> float:
        """That of the first step: what put `amax` into the top octave, or dalle's number."""
        if self.how == "dalle":
            return float(_FIRST + _ranks())
        return float(math.floor(math.log2(self.largest) - math.log2(amax)))

    def _aligned(self, exponent: float, amax: float) -> float:
        scaled = math.ldexp(amax, int(exponent))
        if scaled > self.largest:
            return exponent - 1
        return exponent + 1 if 0 < scaled <= self.largest / 2 else exponent

    def _moved(self, exponent: float) -> float:
        pause = float(self.pause)
        self.pause.fill_(max(pause - 1, 0))
        if not self._has_saturated:
            return exponent + 1 / 1000
        if pause > 0:
            return exponent
        self.pause.fill_(_PAUSE)
        return exponent - 0.5


def _ranks() -> float:
    """log2 M."""
    return math.log2(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 0.0
