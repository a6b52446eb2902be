"""ShuffleNet V2 (Ma, Zhang, Zheng, Sun, ECCV 2018) for small images, in the form and with the names of RepDistiller."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Linear
from .ShuffleNetv1 import channel_shuffle

_STEM = 24


def _conv1x1(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, bias=False)


def _depthwise3x3(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class BasicBlock(nn.Module):
    """Half the channels pass by; the others go through 1 x 1, depthwise 3 x 3 and 1 x 1; a shuffle mixes both.

    Returns (output, (the half that passed by, the other one before its last ReLU)).
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = _conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise3x3(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        kept, x = x.chunk(2, dim=1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        before = self.bn3(self.conv3(x))
        return channel_shuffle(torch.cat([kept, F.relu(before)], dim=1), 2), (kept, before)


class DownBlock(nn.Module):
    """Half the resolution: two branches that both see every channel, and a shuffle that mixes them."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        half = channels_out // 2
        self.conv1 = _depthwise3x3(channels_in, stride=2)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv2 = _conv1x1(channels_in, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv1x1(channels_in, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return channel_shuffle(torch.cat([left, right], dim=1), 2)


class _Stage(nn.Sequential):
    """A ``DownBlock`` and basic blocks; the last one's output and halves."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        down, *blocks = self
        x = down(x)
        for block in blocks:
            x, halves = block(x)
        return x, halves


class ShuffleNetV2(nn.Module):
    """A ShuffleNet V2 of three stages, each of half the resolution, behind a stem that keeps it.

    Args:
        widths: channels of the stages, even.
        blocks: basic blocks of the stages, one at least.
        last_width: channels of the 1 x 1 convolution before the pooling.
        num_classes: 0 builds no classifier: the logits are then the pooled features.
    """

    def __init__(self, widths: list[int], blocks: list[int], last_width: int, num_classes: int = 100):
        super().__init__()
        self.conv1 = _conv1x1(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        channels = _STEM
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            rest = [BasicBlock(width) for _ in range(count)]
            setattr(self, f"layer{stage}", _Stage(DownBlock(channels, width), *rest))
            channels = width
        self.conv2 = _conv1x1(channels, last_width)
        self.bn2 = nn.BatchNorm2d(last_width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = last_width
        self.linear = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """There is none: half the channels of a stage's map pass by the norms of its last block.

        Raises:
            ValueError: always.
        """
        raise ValueError("no norm of ShuffleV2 covers all channels of a map: a method that needs one cannot use it")

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, stage 1, 2, 3, pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: give the stages' maps as they are before their last ReLU, which is also before the last shuffle.
        """
        maps = [F.relu(self.bn1(self.conv1(x)))]
        x = maps[0]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, halves = stage(x)
            maps.append(torch.cat(halves, dim=1) if preact else x)
        pooled = self.avgpool(F.relu(self.bn2(self.conv2(x)))).flatten(1)
        logits = self.linear(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


ShuffleV2 = partial(ShuffleNetV2, [116, 232, 464], [3, 7, 3], 1024)
