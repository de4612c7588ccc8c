"""Build: a fresh model of a config and of the sizes of its data. Nothing is fetched from a hub."""

from importlib import import_module

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from launch.training.config import RunConfig
from launch.training.models.registry import MODELS


def build_model(config: RunConfig, **sizes: int) -> nn.Module:
    """A fresh model in `config.dtype`; the same seed gives the same weights on every rank.

    `sizes` are those of the data: vocab of text; classes, channels and size of images. Called as
    `model(input_ids=x_BT).logits` (shape B, T, vocab) or `model(pixel_values=x_BCHW).logits` (shape B, classes). No
    dropout, so that runs under two policies differ in their numerics only. Batch norms stay fp32: a running mean in
    bf16 stands still once a step moves it by less than its last bit.
    """
    torch.manual_seed(config.seed)
    module, _, function = MODELS[config.model].build.partition(":")
    model: nn.Module = getattr(import_module(module), function)(config, **sizes)
    if config.dtype == "bf16":
        model.to(torch.bfloat16)
        for each in model.modules():
            if isinstance(each, _BatchNorm):
                each.float()
    return model
