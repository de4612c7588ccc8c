"""Gradients: those that reach the products of a net that has learned for a while, for experiments on their casts."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from launch.training.config import RunConfig
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
        hooks = []
        for name, module in run.model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):

                def keep(module: nn.Module, into: object, out: tuple[Tensor, ...], name: str = name) -> None:
                    found[name] = out[0].detach().clone()

                hooks.append(module.register_full_backward_hook(keep))
        x, y = run.data.batch(config, config.steps, 0, 0)
        run.model.train()
        loss = cross_entropy(run.model(pixel_values=x).logits, y)
        loss.backward()
        for hook in hooks:
            hook.remove()
    return found
