"""ResNet: blocks of two 3x3 convolutions around which the input goes (He et al., CVPR 2016).

--layers is the number of blocks and --width the channels of the first stage: 9 and 16 on CIFAR-10 are ResNet-20 (with
1x1 convolutions where a stage begins), 8 and 64 on pictures of 224 pixels ResNet-18.
"""

from torch import Tensor, nn

from launch.training.config import RunConfig
from launch.training.models.classifier import Classifier, ConvNorm, stages, stem_of


def resnet(config: RunConfig, classes: int, channels: int, size: int) -> nn.Module:
    blocks = [_Block(inputs, outputs, stride) for inputs, outputs, stride in stages(config, size)]
    return Classifier(stem_of(config, channels, size), list(blocks), blocks[-1].outputs, classes)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3, active=False)
        is_same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if is_same else ConvNorm(inputs, outputs, 1, stride, active=False)
        self.relu = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.relu(self.second(self.first(x_BCHW)) + self.shortcut(x_BCHW))
        return y_BCHW
