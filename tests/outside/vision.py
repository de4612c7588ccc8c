"""Models of timm, which the checks need installed: convolutions of odd geometry, computed weights, odd attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.outside.architectures import Architecture, Batch


class _Classifier(nn.Module):
    """A model of timm that takes its images by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(pixel_values)}


def _images(size: int) -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        return {"pixel_values": torch.randn(2 + seed, 3, size, size, generator=torch.Generator().manual_seed(seed))}

    return batch


def _named(name: str, size: int, **options: Any) -> Architecture:
    """One of timm's models as it is."""

    def make() -> nn.Module:
        import timm

        return _Classifier(timm.create_model(name, num_classes=10, **options))

    return Architecture(make, _images(size))


def _made(name: str, size: int, **sizes: Any) -> Architecture:
    """A small one of a class of timm's models."""

    def make() -> nn.Module:
        import timm.models

        return _Classifier(getattr(timm.models, name)(num_classes=10, **sizes))

    return Architecture(make, _images(size))


VISION: dict[str, Architecture] = {
    "nf_resnet26": _named("nf_resnet26", 32),  # scaled weight standardisation, skips with gains
    "resnetv2": _made("ResNetV2", 32, layers=[1, 1, 1, 1], channels=[128, 128, 128, 128]),  # weight standardisation
    "tf_efficientnet_b0": _named("tf_efficientnet_b0", 33),  # padding chosen by the size of the image, depthwise
    "tf_efficientnet_cc_b0_4e": _named("tf_efficientnet_cc_b0_4e", 32),  # a mixture of kernels for each image
    "mixnet_s": _named("mixnet_s", 32),  # kernels of several sizes side by side
    "convmixer": _made("ConvMixer", 28, dim=32, depth=2),  # padding "same" as a word
    "xcit_nano_12_p8_224": _named("xcit_nano_12_p8_224", 32),  # attention over channels
    "volo": _made("VOLO", 32, layers=(1, 1, 1, 1), img_size=32, embed_dims=(24, 48, 48, 48), num_heads=(2, 4, 4, 4)),
    # attention from unfolded images
    "lambda_resnet26t": _named("lambda_resnet26t", 64),  # lambda layers with a 3d convolution
    "mobileone_s0": _named("mobileone_s0", 32),  # branches that are made one for inference
    "maxvit_pico_rw_256": _named("maxvit_pico_rw_256", 64, img_size=64),  # windows, grids, relative biases
    "crossvit": _named("crossvit_tiny_240", 240),  # two sizes of patches that look at each other
}
