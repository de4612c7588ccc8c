"""AdamW with decoupled decay, in the equations and the order of operations of torch.optim.AdamW.

    w = w (1 - lr lambda)
    m = m + (1 - beta1) (g - m)                      g: the gradient over the loss scale
    v = beta2 v + (1 - beta2) g g
    w = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Source: Loshchilov, Hutter, ICLR 2019, algorithm 2; the order is torch's.
"""

from typing import Any, ClassVar

from runtime.errors import LpError
from runtime.optim.formats import UpdateFormats
from runtime.optim.one_pass import adamw_in_one_pass
from runtime.optim.optimizer import AbstractOptimizer, Weight, check_at_least

_M, _V, _MASTER = range(3)


class LowPrecisionAdamW(AbstractOptimizer):
    """AdamW whose weights and moments are in any scalar float formats, chosen independently.

    Computed in fp32 by torch's operations, but for the square root, which is rounded correctly. So with every format in
    fp32, or a bf16+16 master and moments in fp32, the bits are those of torch.optim.AdamW (its plain path) on fp32
    parameters wherever its square root is: that of MKL is off by an ulp for one value in 160, and the weight then too,
    now and again. A step moves the weight by the moments as
    computed, and rounds moments and weight once each as it keeps them, as `rounding` says. Saturates; NaN and Inf of a
    gradient go into the weights. Errors: AbstractOptimizer's, and LpError for numbers out of range.
    """

    MOMENTS: ClassVar[dict[str, str]] = {"exp_avg": "momentum", "exp_avg_sq": "variance"}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        formats: UpdateFormats | None = None,
        seed: int = 0,
        loss_scale: float = 1.0,
    ) -> None:
        check_at_least("LowPrecisionAdamW", lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise LpError("betas do not fit", where="LowPrecisionAdamW", expected="0 <= beta < 1", got=str(betas))
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "loss_scale": loss_scale}
        super().__init__(params, numbers, formats, seed)

    def _update(self, weight: Weight) -> None:
        if adamw_in_one_pass(weight, (_M, _V, _MASTER)):
            return
        group, step = weight.group, weight.step
        (beta1, beta2), lr = group["betas"], group["lr"]
        master, g = weight.load("master"), weight.gradient()
        if group["loss_scale"] != 1:
            g = g * (1 / group["loss_scale"])
        m = weight.load("exp_avg").lerp_(g, 1 - beta1)
        v = weight.load("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["weight_decay"]:
            master.mul_(1 - lr * group["weight_decay"])
        denominator = (v.double().sqrt().float() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        master.addcdiv_(m, denominator, value=-(lr / (1 - beta1**step)))
        weight.store("exp_avg", weight.rounded("exp_avg", m, _M), _M)
        weight.store("exp_avg_sq", weight.rounded("exp_avg_sq", v, _V), _V)
        weight.store("master", weight.rounded("master", master, _MASTER))
