"""Momentum SGD as three AXPYs, each rounded once (Wang et al., NeurIPS 2018, section 3; HFP8 2019).

    (1) dw     = Q(dw / S + lambda w)         S: the loss scale, lambda: weight_decay
    (2) dw_old = Q(m dw_old + eta dw)         m: momentum, eta: -lr
    (3) w      = Q(w + dw_old)

torch.optim.SGD has eta in (3), outside of the momentum: other bits, and other numbers where lr changes while m > 0.
"""

from typing import Any, ClassVar

from runtime.errors import NotSupported
from runtime.optim.block_names import block_state_of
from runtime.optim.formats import UpdateFormats
from runtime.optim.one_pass import sgd_in_one_pass
from runtime.optim.optimizer import AbstractOptimizer, Weight, check_at_least
from runtime.optim.rounding import combined

_DW, _MOMENTUM, _MASTER = range(3)


class LowPrecisionSGD(AbstractOptimizer):
    """SGD whose master and momentum are in any scalar float format.

    Each AXPY is the exact sum of its two products, rounded once: (1) and (2) to the format of the momentum, (3) to the
    master's, fp32 to nearest, others as `rounding` says. lr, m and lambda are taken as fp32. With every format in fp32,
    and lr and m powers of two, the bits are those of torch.optim.SGD; else they differ where torch rounds m dw_old, and
    lr times the sum, before it adds. Momentum 0 keeps no state for it. Saturates beyond a format's largest value; NaN
    and Inf of a gradient go into the weights. Errors: AbstractOptimizer's, and LpError for a negative number.
    """

    MOMENTS: ClassVar[dict[str, str]] = {"momentum_buffer": "momentum"}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        formats: UpdateFormats | None = None,
        seed: int = 0,
        loss_scale: float = 1.0,
    ) -> None:
        check_at_least("LowPrecisionSGD", lr=lr, momentum=momentum, weight_decay=weight_decay)
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "loss_scale": loss_scale}
        super().__init__(params, numbers, formats, seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """NotSupported also for a momentum in blocks: AXPY (1) has its format, and no scale before it is made."""
        super().add_param_group(param_group)
        if block_state_of(name := self.param_groups[-1]["momentum_format"]):
            raise NotSupported(
                "SGD keeps no momentum in blocks", where="LowPrecisionSGD", expected="a scalar float format", got=name,
                hint="AdamW, or momentum: bf16",
            )  # fmt: skip

    def _moments(self, group: dict[str, Any]) -> dict[str, str]:
        return self.MOMENTS if group["momentum"] else {}

    def _update(self, weight: Weight) -> None:
        if sgd_in_one_pass(weight, (_DW, _MOMENTUM, _MASTER)):
            return
        group, master, name = weight.group, weight.load("master"), "momentum_buffer"
        dw = combined(1 / group["loss_scale"], weight.gradient(), group["weight_decay"], master)
        dw = weight.rounded(name, dw, _DW)
        old = weight.load(name) if group["momentum"] else dw.new_zeros(dw.shape)
        moved = weight.rounded(name, combined(group["momentum"], old, -group["lr"], dw), _MOMENTUM)
        if group["momentum"]:
            weight.store(name, moved)
        weight.store("master", weight.rounded("master", combined(1.0, master, 1.0, moved), _MASTER))
