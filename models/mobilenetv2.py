"""MobileNetV2 (Sandler et al., CVPR 2018) for small images, in the form and with the names of RepDistiller."""

from functools import partial

from torch import Tensor, nn

from .heads import Linear

# Channels at width 1, blocks, stride of the first block.
_STAGES = [(16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
# Their maps are features: the last stages of each resolution.
_TAPPED = (1, 2, 4, 6)


def _conv_bn_relu(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


class InvertedResidual(nn.Module):
    """1 x 1 to ``expansion`` times the channels, depthwise 3 x 3, 1 x 1 with no ReLU; a shortcut where shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int):
        super().__init__()
        wide = channels_in * expansion
        self.shortcut = stride == 1 and channels_in == channels_out
        self.conv = nn.Sequential(
            *_conv_bn_relu(channels_in, wide, 1),
            *_conv_bn_relu(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """A MobileNetV2 whose last map has a sixteenth of the image's resolution.

    Args:
        expansion: factor of the channels within a block; the first stage does not expand.
        width: factor of all channels; the last convolution's 1280 grow with it but do not shrink.
        num_classes: 0 builds no classifier: the logits are then the pooled features.
    """

    def __init__(self, expansion: int, width: float, num_classes: int = 100):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _conv_bn_relu(3, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for i, (full, count, stride) in enumerate(_STAGES):
            channels_in, channels, factor = channels, int(full * width), expansion if i > 0 else 1
            first = InvertedResidual(channels_in, channels, stride, factor)
            rest = [InvertedResidual(channels, channels, 1, factor) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(first, *rest))
        self.num_features = max(1280, int(1280 * width))
        self.conv2 = _conv_bn_relu(channels, self.num_features, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(Linear(self.num_features, num_classes)) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.blocks])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last norms of the stages whose maps are features; no ReLU follows them."""
        return [self.blocks[i][-1].conv[-1] for i in _TAPPED]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, four stages' maps, pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: changes nothing: stages end in no ReLU.
        """
        x = self.conv1(x)
        maps = [x]
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in _TAPPED:
                maps.append(x)
        pooled = self.avgpool(self.conv2(x)).flatten(1)
        logits = self.classifier(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


mobile_half = partial(MobileNetV2, 6, 0.5)
