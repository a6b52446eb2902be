"""VGGs with batch norm for small images (Simonyan and Zisserman, ICLR 2015), in the form and with the names of
RepDistiller: five blocks and one linear layer. What its table calls vgg8 is its vgg8_bn, and so on.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .heads import Linear

_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _block(channels_in: int, channels_out: int, convolutions: int) -> nn.Sequential:
    """Convolutions, each with norm and ReLU; the last ReLU is left to the caller, who wants what comes before it."""
    layers = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
        channels_in = channels_out
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """A VGG of five blocks, the average of the last one's map, and a linear classifier.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: 0 builds no classifier: the logits are then the pooled features.

    Raises:
        ValueError: for any other depth.
    """

    def __init__(self, depth: int, num_classes: int = 100):
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _CONVOLUTIONS))}, got {depth}")
        convolutions = _CONVOLUTIONS[depth]
        self.block0 = _block(3, 64, convolutions[0])
        self.block1 = _block(64, 128, convolutions[1])
        self.block2 = _block(128, 256, convolutions[2])
        self.block3 = _block(256, 512, convolutions[3])
        self.block4 = _block(512, 512, convolutions[4])
        self.pool0 = nn.MaxPool2d(2)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.pool3 = nn.MaxPool2d(2)
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.num_features = 512
        self.classifier = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        blocks = [self.block0, self.block1, self.block2, self.block3, self.block4]
        pools = [self.pool0, self.pool1, self.pool2, self.pool3, self.pool4]
        return nn.ModuleList([module for pair in zip(blocks, pools, strict=True) for module in pair])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [block[-1] for block in (self.block1, self.block2, self.block3, self.block4)]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([block 0, 1, 2, 3, 4, pooled], logits).

        Args:
            x: (B, 3, H, W). Before block 4, only images of 64 pixels and more are pooled.
            preact: give the maps of blocks 1 to 4 as they are before their last ReLU.
        """
        pool3 = self.pool3 if x.shape[2] >= 64 else nn.Identity()
        x = F.relu(self.block0(x))
        maps = [x]
        pools = (self.pool0, self.pool1, self.pool2, pool3)
        for pool, block in zip(pools, (self.block1, self.block2, self.block3, self.block4), strict=True):
            before = block(pool(x))
            x = F.relu(before)
            maps.append(before if preact else x)
        pooled = self.pool4(x).flatten(1)
        logits = self.classifier(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


vgg8 = partial(VGG, 8)
vgg11 = partial(VGG, 11)
vgg13 = partial(VGG, 13)
vgg16 = partial(VGG, 16)
vgg19 = partial(VGG, 19)
