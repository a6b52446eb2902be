"""Losses together with the layers that make the student's features comparable with the teacher's.

The table of methods needs these; RepDistiller's train_student.py puts them together by hand for each method.
"""

import torch
from torch import Tensor, nn

from errors import InputError
from models.util import Connector, ConnectorV2, ConvReg, LinearEmbed, Paraphraser, ReviewFusion, Translator

from .AB import ABLoss
from .CC import Correlation
from .FitNet import HintLoss
from .FSP import FSP
from .FT import FactorTransfer
from .IRG import IRG
from .NormDirection import NormDirection
from .OFD import OFD, ofd_margin
from .ReviewKD import HCL
from .SimKD import simkd_loss
from .WKD import WKDFeature


class Hint(nn.Module):
    """FitNet's regressor from the student's features at one layer to the teacher's, and the hint loss on them.

    Args:
        shape_s: shape of the student's features at that layer, (N, C, H, W), or (N, D) for pooled ones.
        shape_t: shape of the teacher's features.
        layer: the layer's number.
    """

    def __init__(self, shape_s: tuple[int, ...], shape_t: tuple[int, ...], layer: int):
        super().__init__()
        pooled = len(shape_s) == 2 or len(shape_t) == 2
        if pooled and len(shape_s) != len(shape_t):
            raise InputError(
                f"--hint_layer {layer} is a map for one network and the pooled features for the other: "
                f"{tuple(shape_s)} and {tuple(shape_t)}; choose a lower one"
            )
        self.layer = layer
        self.regressor = LinearEmbed(shape_s[1], shape_t[1]) if pooled else ConvReg(shape_s, shape_t)
        self.loss = HintLoss()

    def forward(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        return self.loss(self.regressor(feat_s[self.layer]), feat_t[self.layer])


class EmbeddedCorrelation(nn.Module):
    """Correlation congruence on linear embeddings of both networks' pooled features."""

    def __init__(self, s_dim: int, t_dim: int, feat_dim: int):
        super().__init__()
        self.embed_s, self.embed_t = LinearEmbed(s_dim, feat_dim), LinearEmbed(t_dim, feat_dim)
        self.loss = Correlation()

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.loss(self.embed_s(f_s), self.embed_t(f_t))


class OfLast(nn.Module):
    """Gives a loss of lists the last stage's maps alone, or embeddings."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, x_s: list[Tensor] | Tensor, x_t: list[Tensor] | Tensor) -> list[Tensor]:
        return self.loss(*([x] if isinstance(x, Tensor) else x[-1:] for x in (x_s, x_t)))


class Regression(nn.Module):
    """SimKD's loss on the last stage's maps, or on embeddings; the student itself has the projector."""

    def forward(self, x_s: list[Tensor] | Tensor, x_t: list[Tensor] | Tensor) -> Tensor:
        return simkd_loss(*(x if isinstance(x, Tensor) else x[-1] for x in (x_s, x_t)))


class LayerwiseVID(nn.ModuleList):
    """A variational information loss, with its regressor, for each pair of maps."""

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> list[Tensor]:
        return [loss(f_s, f_t) for loss, f_s, f_t in zip(self, maps_s, maps_t, strict=False)]


class Review(nn.Module):
    """ReviewKD's loss on the student's stages and pooled features, fused from the last to the first."""

    def __init__(self, shapes_s: list, shapes_t: list):
        super().__init__()
        self.fusion = ReviewFusion(shapes_s[1:], shapes_t[1:])
        self.loss = HCL()

    def forward(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        return self.loss(self.fusion(feat_s[1:]), feat_t[1:])


class Overhaul(nn.Module):
    """OFD's loss on the student's maps before their ReLU, each after a convolution to the teacher's channels."""

    def __init__(self, shapes_s: list, shapes_t: list, norms_t: list[nn.BatchNorm2d]):
        super().__init__()
        self.connectors = ConnectorV2(shapes_s, shapes_t)
        self.loss = OFD([ofd_margin(norm) for norm in norms_t])

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
        return self.loss(self.connectors(maps_s), maps_t)


class ProjectedDirection(nn.Module):
    """KD++'s loss on embeddings, the student's after a linear layer where the widths differ."""

    def __init__(self, s_dim: int, t_dim: int, num_classes: int):
        super().__init__()
        self.embed = nn.Identity() if s_dim == t_dim else nn.Linear(s_dim, t_dim)
        self.loss = NormDirection(torch.zeros(num_classes, t_dim))

    def acquaint(self, *known) -> None:
        """See ``NormDirection``."""
        self.loss.acquaint(*known)

    def forward(self, f_s: Tensor, f_t: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.embed(f_s), f_t, target)


class ProjectedWKD(nn.Module):
    """WKD's loss on the last stages' maps, the student's after a convolution to the teacher's channels."""

    def __init__(self, shape_s: tuple[int, ...], shape_t: tuple[int, ...]):
        super().__init__()
        layers = nn.Conv2d(shape_s[1], shape_t[1], 1, bias=False), nn.BatchNorm2d(shape_t[1]), nn.ReLU(inplace=True)
        self.embed = nn.Sequential(*layers)
        self.loss = WKDFeature()

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
        return self.loss(self.embed(maps_s[-1]), maps_t[-1])


class InstanceGraph(IRG):
    """IRG on the maps of the last two stages."""

    def terms(self, f_s, f_t, logit_s, logit_t, maps_s: list[Tensor], maps_t: list[Tensor]) -> dict[str, Tensor]:
        return super().terms(f_s, f_t, logit_s, logit_t, maps_s[-2:], maps_t[-2:])


class TwoStage(nn.Module):
    """A method with a first stage, which trains its loss, or a part of it, before the student is trained."""

    def init_modules(self, student: nn.Module) -> nn.ModuleList:
        """The modules of this method and of the student's backbone that the first stage trains."""
        raise NotImplementedError

    def init_loss(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        """The first stage's loss, on all features of both networks."""
        raise NotImplementedError

    def init_learning_rate(self, model_s: str, learning_rate: float) -> float:
        """The first stage's learning rate, given the student's name and its learning rate."""
        return learning_rate


class Boundaries(TwoStage):
    """Activation boundaries: in the first stage the student learns which of the teacher's neurons are active."""

    def __init__(self, shapes_s: list, shapes_t: list):
        super().__init__()
        self.connector = Connector(shapes_s[1:-1], shapes_t[1:-1])
        self.loss = ABLoss(len(shapes_s[1:-1]))

    def init_modules(self, student: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([self.connector, student.get_feat_modules()])

    def init_loss(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        return sum(self.loss(self.connector(feat_s[1:-1]), feat_t[1:-1]))


class Flow(TwoStage):
    """The flow of solution procedure: in the first stage the student learns the products of neighbouring maps."""

    def __init__(self, shapes_s: list, shapes_t: list):
        super().__init__()
        channels_s, channels_t = ([shape[1] for shape in shapes[:-1]] for shapes in (shapes_s, shapes_t))
        if channels_s != channels_t:
            raise InputError(f"FSP needs the same channels in both networks' layers, got {channels_s} and {channels_t}")
        self.loss = FSP(shapes_s[:-1], shapes_t[:-1])

    def init_modules(self, student: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([student.get_feat_modules()])

    def init_loss(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        return sum(self.loss(feat_s[:-1], feat_t[:-1]))


class Factor(TwoStage):
    """Factor transfer: the first stage trains the paraphraser of the teacher's last map, which then is frozen."""

    def __init__(self, shapes_s: list, shapes_t: list):
        super().__init__()
        self.translator = Translator(shapes_s[-2], shapes_t[-2])
        self.paraphraser = Paraphraser(shapes_t[-2])
        self.loss = FactorTransfer()

    def init_modules(self, student: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([self.paraphraser])

    def init_loss(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        _, reconstructed = self.paraphraser(feat_t[-2])
        return nn.functional.mse_loss(reconstructed, feat_t[-2])

    def init_learning_rate(self, model_s: str, learning_rate: float) -> float:
        # RepDistiller takes 0.01 too; at the students' own 0.05 the paraphraser may not converge.
        return 0.01 if model_s.startswith(("resnet", "wrn")) else learning_rate

    def forward(self, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
        with torch.no_grad():
            factor_t = self.paraphraser(feat_t[-2], is_factor=True)
        return self.loss(self.translator(feat_s[-2]), factor_t)
