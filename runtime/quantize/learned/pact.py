"""PACT: the clip is a parameter, a; the scale is a / high (Choi et al., arXiv 1805.06085, equations 1 to 3).

    x^ = s round(clip(x, low s, a) / s),  s = a / high          low is 0 for an unsigned format: clip(x, 0, a)
    dx^/dx = 1 inside, 0 beyond an end;  dx^/da = 1 where x >= a, low / high where x <= low s, else 0

An unsigned format makes zero of what is negative, as the relu before it does. The paper adds a penalty on a^2: weight
decay on `lp_parameters(model)`, of the order of that of the weights.
"""

import torch
from torch import Tensor, nn

from runtime.numerics.quantizer_specs import QuantizerSpec
from runtime.numerics.specs import QuantSpec
from runtime.quantize.learned.quantizer import LEAST, Learned, at_least

FIRST_CLIP = 8.0


class Pact(Learned):
    """`clip` (1,): a, before it is kept above 2^-10 of what it began as."""

    kind = "pact"

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__(spec, owner, is_weight)
        assert isinstance(spec.quantizer, QuantizerSpec)
        self.first = spec.quantizer.init or FIRST_CLIP
        self.clip = nn.Parameter(torch.full((1,), self.first))  # (1,): FSDP2 shards no parameter without dims

    def step(self) -> Tensor:
        clip = self.clip.float()
        return at_least(clip, torch.full_like(clip, self.first * LEAST)).reshape(()) / self.high

    def reset_parameters(self) -> None:
        nn.init.constant_(self.clip, self.first)
