"""Gradients: those that reach the products of a net that has learned for a while, for experiments on their casts."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from launch.training.config import RunConfig
from launch.training.models.registry import MODELS
from launch.training.trainer import Run
from launch.training.world import lone_world
from lpcompile import load_policy


def output_gradients(config: RunConfig) -> dict[str, Tensor]:
    """Name of a Linear or convolution -> dy of one more batch after `config.steps` steps in fp32; fp32 tensors."""
    found: dict[str, Tensor] = {}
    with lone_world(torch.device("cpu")) as world, tempfile.TemporaryDirectory() as folder:
        run = Run(config, load_policy("fp32"), Path(folder), world)
        for step in range(config.steps):
            run.step(step)
        hooks = [
            module.register_forward_hook(_keeper(found, name))
            for name, module in run.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D"
        ]
        x, y = run.data.batch(config, config.steps, 0, 0)
        run.model.train()
        logits = run.model(**{MODELS[config.model].input_name: x}).logits
        loss = cross_entropy(logits.flatten(0, -2), y.flatten())
        loss.backward()
        for hook in hooks:
            hook.remove()
    return found


def _keeper(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that keeps the gradient of its module's output."""

    def keep(dy: Tensor) -> None:
        found[name] = dy.detach().clone()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(keep)

    return hook
