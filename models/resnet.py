"""ResNets for small images (He et al., CVPR 2016), in the form and with the names of RepDistiller."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Linear


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; returns (output, output before the last ReLU)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        preact = self.bn2(self.conv2(out)) + shortcut
        return F.relu(preact), preact


class _Stage(nn.Sequential):
    """Blocks in a row; the last one's output and pre-activation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = x
        for block in self:
            x, preact = block(x)
        return x, preact


class ResNet(nn.Module):
    """A CIFAR ResNet of three stages.

    Args:
        depth: 6n + 2 for n blocks a stage.
        num_filters: channels of the stem and of the three stages.
        num_classes: 0 builds no classifier: the logits are then the pooled features.
    """

    def __init__(self, depth: int, num_filters: list[int], num_classes: int = 100):
        super().__init__()
        if (depth - 2) % 6 != 0:
            raise ValueError(f"depth must be 6n + 2, got {depth}")
        blocks = (depth - 2) // 6
        stem, *widths = num_filters
        self.conv1 = _conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        for stage, (channels_in, channels_out) in enumerate(zip(num_filters, widths, strict=False), start=1):
            first = BasicBlock(channels_in, channels_out, stride=1 if stage == 1 else 2)
            rest = [BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", _Stage(first, *rest))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = widths[-1]
        self.fc = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.relu, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].bn2 for stage in (self.layer1, self.layer2, self.layer3)]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, stage 1, 2, 3, pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: give the stages' maps as they are before their last ReLU.
        """
        maps = [self.relu(self.bn1(self.conv1(x)))]
        x = maps[0]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, before = stage(x)
            maps.append(before if preact else x)
        pooled = self.avgpool(x).flatten(1)
        logits = self.fc(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


_NARROW, _WIDE = [16, 16, 32, 64], [32, 64, 128, 256]

resnet8 = partial(ResNet, 8, _NARROW)
resnet14 = partial(ResNet, 14, _NARROW)
resnet20 = partial(ResNet, 20, _NARROW)
resnet32 = partial(ResNet, 32, _NARROW)
resnet44 = partial(ResNet, 44, _NARROW)
resnet56 = partial(ResNet, 56, _NARROW)
resnet110 = partial(ResNet, 110, _NARROW)
resnet8x4 = partial(ResNet, 8, _WIDE)
resnet32x4 = partial(ResNet, 32, _WIDE)
