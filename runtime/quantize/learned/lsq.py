"""LSQ: the scale itself is learned (Esser et al., arXiv 1902.08153, equations 1 to 5).

    x^ = s round(clip(x / s, -Qn, Qp))
    dx^/dx = 1 where -Qn < x / s < Qp, else 0;  dx^/ds = -Qn, round(x / s) - x / s, Qp below, inside, above
    the gradient of s times 1 / sqrt(N Qp);  s begins at 2 E|x| / sqrt(Qp)

N counts the elements of a weight, and of an activation those of one sample. s = base + offset: `base`, a buffer, is
what s begins as, found in the weight or in the first batch, the mean over all ranks; `offset`, the parameter, is what
the optimizer adds. An engine that shards parameters leaves buffers whole, so that the first forward can set one; and
the derivative in `offset` is that in s. All ranks are to see their first batch together; `init` needs none.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.kernels.torch_ops import declare
from runtime.numerics.quantizer_specs import QuantizerSpec
from runtime.numerics.specs import QuantSpec
from runtime.quantize.learned.quantizer import LEAST, Learned, at_least


class Lsq(Learned):
    """`base` (1,) and `offset` (1,); base 0: nothing was seen yet."""

    kind = "lsq"
    has_residual = True
    base: Tensor

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__(spec, owner, is_weight)
        assert isinstance(spec.quantizer, QuantizerSpec)
        self.first = spec.quantizer.init or 0.0
        self.register_buffer("base", torch.full((1,), self.first))
        self.offset = nn.Parameter(torch.zeros(1))
        self._is_settled = self.first > 0

    def step(self) -> Tensor:
        base = self.base.float()
        return at_least(base + self.offset.float(), base * LEAST).reshape(())

    def gradient_scale(self, x: Tensor) -> float:
        per_sample = x.shape[1:] if x.dim() > 1 and not self.is_weight else x.shape
        return float((max(per_sample.numel(), 1) * self.high) ** -0.5)

    def observe(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():  # where a flag that changes would compile the second step anew
            with torch.no_grad():
                self.base.copy_(torch.ops.lp.first_step(x.detach(), self.base, self.high, self.is_weight))
        elif not self._is_settled and not x.is_meta:  # without values there is no first step
            _settle(x, self.base, self.high, self.is_weight)
            self._is_settled = True

    def reset_parameters(self) -> None:
        nn.init.constant_(self.base, self.first)
        nn.init.zeros_(self.offset)
        self._is_settled = self.first > 0

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._is_settled = False  # what was loaded may have seen nothing


@torch.no_grad()
def _settle(x: Tensor, base: Tensor, high: float, is_weight: bool) -> None:
    """Let `base` be 2 E|x| / sqrt(high) if it is not set; 1 / high where x is all zeros or not finite."""
    if x.numel() == 0 or bool(base > 0):
        return
    mean = x.detach().abs().float().mean().reshape(1)
    if not is_weight and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    first = 2.0 * mean / high**0.5
    base.copy_(torch.where(torch.isfinite(first) & (first > 0), first, torch.full_like(first, 1.0 / high)))


def _first_step(x: Tensor, base: Tensor, high: float, is_weight: bool) -> Tensor:
    """What `_settle` makes of base, as a new tensor: what an op wrote into a buffer did not survive Inductor."""
    settled = base.clone()
    _settle(x, settled, high, is_weight)
    return settled


declare(
    "first_step(Tensor x, Tensor base, float high, bool is_weight) -> Tensor",
    _first_step,
    fake=lambda x, base, high, is_weight: torch.empty_like(base),
)
