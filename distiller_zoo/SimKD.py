"""Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022, arXiv 2203.14001)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def simkd_projector(s_channels: int, hidden: int, t_channels: int, maps: bool = True) -> nn.Sequential:
    """Three layers from the student's channels to the teacher's, each with batch norm and ReLU.

    Args:
        s_channels, hidden, t_channels: channels of the student, between the layers, and of the teacher.
        maps: convolutions on maps. Otherwise linear layers on embeddings, without the last ReLU: a frozen encoder's
            embedding has negative entries.
    """
    layers = []
    for inputs, outputs, size in ((s_channels, hidden, 1), (hidden, hidden, 3), (hidden, t_channels, 1)):
        if maps:
            layers += [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)]
        else:
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers if maps else layers[:-1])


def shrink(x: Tensor, size: int) -> Tensor:
    """Average-pool maps (B, C, H, W) that are larger to a height and width."""
    return F.adaptive_avg_pool2d(x, size) if x.shape[-1] > size else x


def simkd_loss(x_s: Tensor, x_t: Tensor) -> Tensor:
    """Mean squared error of the student's projected features against the teacher's, over all elements.

    Args:
        x_s: maps (B, C, H, W), or embeddings (B, D).
        x_t: the teacher's; larger maps are average-pooled.
    """
    return F.mse_loss(x_s, shrink(x_t, x_s.shape[-1]) if x_t.dim() == 4 else x_t)


class SimKD(nn.Module):
    """The projector, its loss, and the logits that the teacher's classifier gives the student.

    Args:
        s_channels, t_channels: channels of the student's and of the teacher's last map.
        factor: what the channels between the projector's convolutions are fewer by than the teacher's.
    """

    def __init__(self, s_channels: int, t_channels: int, factor: int = 2):
        super().__init__()
        self.projector = simkd_projector(s_channels, t_channels // factor, t_channels)

    def forward(self, map_s: Tensor, map_t: Tensor, classifier: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the student's logits.

        Args:
            map_s: the student's last map, (B, s_channels, H, W).
            map_t: the teacher's, (B, t_channels, H', W'); the larger of the two is average-pooled.
            classifier: the teacher's, from pooled features (B, t_channels) to logits.
        """
        projected = self.projector(shrink(map_s, map_t.shape[-1]))
        return simkd_loss(projected, map_t), classifier(projected.mean(dim=(2, 3)))
