"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016), in the form and with the names of RepDistiller."""

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Linear


class BasicBlock(nn.Module):
    """Norm, ReLU and 3 x 3 convolution, twice, and a shortcut.

    Where the number of channels changes, the shortcut is a 1 x 1 convolution of the input's activation; elsewhere it
    is the input itself.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.convShortcut = None
        if channels_in != channels_out:
            self.convShortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride)
    rest = [BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)]
    # RepDistiller's checkpoints call the row of blocks `layer`.
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


class WideResNet(nn.Module):
    """A pre-activation ResNet of three stages, without dropout.

    Args:
        depth: 6n + 4 for n >= 1 blocks a stage.
        widen_factor: the stages have 16, 32 and 64 times this many channels.
        num_classes: 0 builds no classifier: the logits are then the pooled features.

    Raises:
        ValueError: for any other depth.
    """

    def __init__(self, depth: int, widen_factor: int = 1, num_classes: int = 100):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth must be 6n + 4, got {depth}")
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, widths[0], blocks, stride=1)
        self.block2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.block3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = widths[2]
        self.fc = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.block1, self.block2, self.block3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, stage 1, 2, 3, pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: give the stages' maps as the norm that reads them leaves them, before its ReLU. In training this
                normalises them a second time, so their batch enters the running statistics twice, as in RepDistiller.
        """
        maps = [self.conv1(x)]
        for stage in (self.block1, self.block2, self.block3):
            maps.append(stage(maps[-1]))
        pooled = self.avgpool(F.relu(self.bn1(maps[-1]))).flatten(1)
        logits = self.fc(pooled)
        if not is_feat:
            return logits
        if preact:
            maps[1:] = [norm(x) for norm, x in zip(self.get_bn_before_relu(), maps[1:], strict=True)]
        return [*maps, pooled], logits


wrn_16_1 = partial(WideResNet, 16, 1)
wrn_16_2 = partial(WideResNet, 16, 2)
wrn_40_1 = partial(WideResNet, 40, 1)
wrn_40_2 = partial(WideResNet, 40, 2)
