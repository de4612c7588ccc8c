"""Loss scale: the power of two S that keeps small gradients above a format's smallest value.

    loss * S  ->  backward  ->  g / S        exact, as S is a power of two

none      S = 1
static    S = init, always
dynamic   an overflow multiplies S by `backoff` and skips the step; `interval` clean steps in a row multiply it by
          `growth` (the rule of torch.amp.GradScaler; Micikevicius et al., ICLR 2018, section 3.2)
"""

import math
from typing import Any, Literal

from runtime.errors import NotSupported

MAX_SKIPS = 32
"""Steps in a row that overflow under a scale that can go no lower: after these a run is over."""
Kind = Literal["none", "static", "dynamic"]


class LossScale:
    """The state machine of one loss scale. Invariant: `value` is a power of two; when dynamic, `value >= minimum`."""

    def __init__(
        self,
        kind: Kind = "none",
        init: float = 65536.0,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        minimum: float = 1.0,
    ) -> None:
        for name, number in (("init", init), ("growth", growth), ("backoff", backoff), ("min", minimum)):
            if not _is_power_of_two(number):
                raise NotSupported(
                    f"loss_scale.{name} must be a power of two, so that scaling loses no bit", got=f"{number:g}"
                )
        self.kind: Kind = kind
        self.growth, self.backoff, self.interval, self.minimum = growth, backoff, interval, minimum
        self.value = 1.0 if kind == "none" else float(init)
        self.clean_steps = 0
        self.skipped = 0

    @property
    def is_dynamic(self) -> bool:
        return self.kind == "dynamic"

    @property
    def is_lowest(self) -> bool:
        """Whether an overflow leaves it where it is."""
        return not self.is_dynamic or self.value <= self.minimum

    def update(self, overflow: bool) -> None:
        """Call once per step, with the overflow of any rank; a step with overflow must not change the weights."""
        if overflow:
            self.skipped += 1
            self.clean_steps = 0
            if self.is_dynamic:
                self.value = max(self.value * self.backoff, self.minimum)
            return
        self.clean_steps += 1
        if self.is_dynamic and self.clean_steps >= self.interval:
            self.clean_steps = 0
            grown = self.value * self.growth
            self.value = grown if grown <= 2.0**127 else self.value

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value, "clean_steps": self.clean_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kind, self.value = state["kind"], state["value"]
        self.clean_steps, self.skipped = state["clean_steps"], state["skipped"]


def _is_power_of_two(number: float) -> bool:
    return number > 0 and math.isfinite(number) and math.frexp(number)[0] == 0.5
