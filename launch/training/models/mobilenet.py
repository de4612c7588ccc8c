"""MobileNet-like: inverted residuals with depthwise convolutions (Sandler et al., MobileNetV2, CVPR 2018).

    x -> 1x1 to 4 times the channels -> depthwise 3x3 -> 1x1 back, without a relu -> + x where the shape is the same

--layers is the number of blocks and --width the channels of the first stage. Not the paper's table of blocks: the
stages are those of the ResNet beside it, and channels grow by 4 and not by 6.
"""

from torch import Tensor, nn

from launch.training.config import RunConfig
from launch.training.models.classifier import Classifier, ConvNorm, stages, stem_of

EXPANSION = 4


def mobilenet(config: RunConfig, classes: int, channels: int, size: int) -> nn.Module:
    blocks = [_InvertedResidual(inputs, outputs, stride) for inputs, outputs, stride in stages(config, size)]
    return Classifier(stem_of(config, channels, size), list(blocks), blocks[-1].outputs, classes)


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs, self.is_same = outputs, inputs == outputs and stride == 1
        wide = EXPANSION * inputs
        self.expand = ConvNorm(inputs, wide, 1)
        self.depthwise = ConvNorm(wide, wide, 3, stride, groups=wide)
        self.project = ConvNorm(wide, outputs, 1, active=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.project(self.depthwise(self.expand(x_BCHW)))
        return x_BCHW + y_BCHW if self.is_same else y_BCHW
