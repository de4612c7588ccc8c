"""Classifier: what the image models have in common: a stem, blocks in stages, a mean over the picture, a linear head.

    x_BCHW -> stem -> blocks -> mean over H and W -> head -> logits_BK

A stage halves height and width and doubles the channels, but for the first. Pictures of up to 64 pixels have three
stages and a stem of stride 1; larger ones have four, and a stem that divides both by 4.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from launch.training.config import RunConfig

LARGEST_SMALL = 64
"""Pixels; beyond them a picture is made smaller before the first block."""


class Classified(NamedTuple):
    """What a classifier returns: `logits` (B, classes), under the name that transformers' classifiers use."""

    logits: Tensor


class Classifier(nn.Module):
    """Called as `model(pixel_values=x_BCHW)`."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], features: int, classes: int) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.head = nn.Linear(features, classes)

    def forward(self, pixel_values: Tensor) -> Classified:
        y_BCHW = self.blocks(self.stem(pixel_values))
        return Classified(self.head(y_BCHW.mean(dim=(2, 3))))


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and a relu if `active`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            *([nn.ReLU()] if active else []),
        )


def stem_of(config: RunConfig, channels: int, size: int) -> nn.Module:
    if size <= LARGEST_SMALL:
        return ConvNorm(channels, config.width, 3)
    return nn.Sequential(ConvNorm(channels, config.width, 7, stride=2), nn.MaxPool2d(3, 2, 1))


def stages(config: RunConfig, size: int) -> Iterator[tuple[int, int, int]]:
    """Inputs, outputs and stride of each block: `layers` of them, as evenly over the stages as can be."""
    num_stages = min(config.layers, 3 if size <= LARGEST_SMALL else 4)
    inputs = config.width
    for stage in range(num_stages):
        outputs = config.width * 2**stage
        blocks = config.layers // num_stages + (stage < config.layers % num_stages)
        for block in range(blocks):
            yield inputs, outputs, 2 if stage > 0 and block == 0 else 1
            inputs = outputs
