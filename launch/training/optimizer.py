"""The optimizer of a run: the rule that --optimizer names, in the formats of the policy's `update`. It can be told to
skip, so that an engine's own bookkeeping goes on as usual.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from launch.training.config import RunConfig
from lpcompile.optimizers import optimizer_class
from runtime.optim.formats import UpdateFormats
from runtime.optim.optimizer import AbstractOptimizer


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose step() leaves weights and moments alone while `skip` is set.

    DeepSpeed offers no way to drop a step whose gradients are finite, but it calls its client's step(): a client that
    does nothing keeps master weights, partitions and counters consistent at every ZeRO stage.
    """

    skip: bool = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if self.skip else super().step(closure)


class MasterWeights:
    """fp32 masters of bf16 parameters: gradients come in, rounded weights go out. For engines without their own."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]

    def take_gradients(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def give_weights(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)

    def state_dict(self) -> list[Tensor]:
        return [master.detach() for master in self.masters]

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor]) -> None:
        for master, saved in zip(self.masters, state, strict=True):
            master.copy_(saved)


def is_torch_adamw(config: RunConfig, update: UpdateFormats) -> bool:
    """Whether torch's own AdamW does what is asked."""
    return config.optimizer == "adamw" and update.is_plain


def build_optimizer(
    config: RunConfig, parameters: list[nn.Parameter], update: UpdateFormats
) -> SkippableAdamW | AbstractOptimizer:
    """The rule, with decay on matrices and none on vectors (biases, norms), whose scale is not a matter of size."""
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups, betas = [group for group in groups if group["params"]], (config.beta1, config.beta2)
    if is_torch_adamw(config, update):
        return SkippableAdamW(groups, lr=config.lr, betas=betas)
    numbers = {"betas": betas} if config.optimizer == "adamw" else _momentum(config)
    optimizer: AbstractOptimizer = optimizer_class(config.optimizer)(
        groups, lr=config.lr, formats=update, seed=config.seed, **numbers
    )
    return optimizer


def stated_bytes(config: RunConfig, parameters: list[nn.Parameter], update: UpdateFormats) -> str:
    """Bytes a parameter that a rank holds, by part; "" where DeepSpeed keeps flat copies of its own."""
    if config.engine == "deepspeed" and (config.zero_stage > 0 or config.dtype != "fp32"):
        return ""
    parts = optimizer_class(config.optimizer)(parameters, formats=update, **_momentum(config)).bytes_by_part()
    return "; bytes a parameter: " + ", ".join(f"{part} {held:.4g}" for part, held in parts.items())


def _momentum(config: RunConfig) -> dict[str, Any]:
    return {"momentum": config.momentum} if config.optimizer == "sgd" else {}
