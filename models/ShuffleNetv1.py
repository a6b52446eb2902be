"""ShuffleNet (Zhang, Zhou, Lin, Sun, CVPR 2018) for small images, in the form and with the names of RepDistiller."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Linear
from .resnet import _Stage

_STEM = 24


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of (B, C, H, W) out: the first of each group, then the second of each, and so on.

    The result has the memory format of ``x``.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        # The reshape below would copy into the contiguous format, and the next convolution back again.
        x = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3)
        return x.permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class Bottleneck(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1; returns (output, output before the last ReLU).

    The shortcut is added; at stride 2 it is average-pooled and appended: ``channels_in`` more channels come out.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int, stride: int = 1):
        super().__init__()
        middle = channels_out // 4
        # The paper leaves the stem's output in one group: it has few channels.
        self.groups = 1 if channels_in == _STEM else groups
        self.stride = stride
        self.conv1 = nn.Conv2d(channels_in, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, channels_out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            preact = out + x
        else:
            preact = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return F.relu(preact), preact


class ShuffleNet(nn.Module):
    """A ShuffleNet of three stages, each of half the resolution, behind a stem that keeps it.

    Args:
        widths: channels of the stages.
        blocks: blocks of the stages, two at least.
        groups: of the 1 x 1 convolutions.
        num_classes: 0 builds no classifier: the logits are then the pooled features.
    """

    def __init__(self, widths: list[int], blocks: list[int], groups: int, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        channels = _STEM
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            first = Bottleneck(channels, width - channels, groups, stride=2)
            rest = [Bottleneck(width, width, groups) for _ in range(count - 1)]
            setattr(self, f"layer{stage}", _Stage(first, *rest))
            channels = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.linear = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].bn3 for stage in (self.layer1, self.layer2, self.layer3)]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, stage 1, 2, 3, pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: give the stages' maps as they are before their last ReLU.
        """
        maps = [F.relu(self.bn1(self.conv1(x)))]
        x = maps[0]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, before = stage(x)
            maps.append(before if preact else x)
        pooled = self.avgpool(x).flatten(1)
        logits = self.linear(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


ShuffleV1 = partial(ShuffleNet, [240, 480, 960], [4, 8, 4], 3)
