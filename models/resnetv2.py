"""The four-stage ResNet of bottlenecks (He et al., CVPR 2016) for small images, in the form of RepDistiller.

It has ImageNet's widths, but its stem is one 3 x 3 convolution of stride 1, and nothing is pooled after it.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Linear
from .resnet import _Stage


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution to 4 times the width; returns (output, output before the last ReLU)."""

    def __init__(self, channels_in: int, width: int, stride: int = 1):
        super().__init__()
        channels_out = 4 * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        preact = self.bn3(self.conv3(out)) + self.shortcut(x)
        return F.relu(preact), preact


class ResNet(nn.Module):
    """A ResNet of four stages of bottlenecks.

    Args:
        num_blocks: of each stage.
        num_classes: 0 builds no classifier: the logits are then the pooled features.

    Raises:
        ValueError: if num_blocks is not four positive numbers.
    """

    def __init__(self, num_blocks: tuple[int, int, int, int], num_classes: int = 100):
        super().__init__()
        if len(num_blocks) != 4 or min(num_blocks) < 1:
            raise ValueError(f"num_blocks must be four positive numbers, got {num_blocks}")
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, blocks in enumerate(num_blocks, start=1):
            width = 32 * 2**stage
            first = Bottleneck(channels, width, stride=1 if stage == 1 else 2)
            channels = 4 * width
            setattr(self, f"layer{stage}", _Stage(first, *(Bottleneck(channels, width) for _ in range(blocks - 1))))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.linear = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].bn3 for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, stage 1, 2, 3, 4, pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: give the stages' maps as they are before their last ReLU.
        """
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [x]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x, before = stage(x)
            maps.append(before if preact else x)
        pooled = self.avgpool(x).flatten(1)
        logits = self.linear(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


ResNet50 = partial(ResNet, (3, 4, 6, 3))
