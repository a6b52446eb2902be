"""Connectors: small trained networks between a student's features and a teacher's, with RepDistiller's names.

Shapes are those of feature maps, (N, C, H, W); N is not read.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError

Shape = Sequence[int]


def _check_maps(name: str, *shapes: Shape) -> None:
    if any(len(shape) != 4 for shape in shapes):
        raise InputError(f"{name} connects maps (N, C, H, W), got {' and '.join(str(tuple(s)) for s in shapes)}")


def _check_pairs(name: str, s_shapes: Sequence[Shape], t_shapes: Sequence[Shape]) -> None:
    if not s_shapes or len(s_shapes) != len(t_shapes):
        shapes = " and ".join(str([tuple(shape) for shape in shapes]) for shapes in (s_shapes, t_shapes))
        raise InputError(f"{name} needs as many student as teacher maps, got {shapes}")


class LinearEmbed(nn.Module):
    """A linear embedding of flattened features.

    Args:
        dim_in: number of features of a sample.
        dim_out: width of the embedding.
    """

    def __init__(self, dim_in: int = 1024, dim_out: int = 128):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) of ``dim_in`` elements a sample to (N, dim_out)."""
        return self.linear(x.flatten(1))


class Embed(LinearEmbed):
    """A linear embedding of flattened features, scaled to unit norm. A zero row stays zero."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) of ``dim_in`` elements a sample to (N, dim_out)."""
        x = super().forward(x)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / norm.masked_fill(norm == 0, 1)


class ConvReg(nn.Module):
    """A convolution and batch norm from the student's map to the teacher's shape (FitNets, Romero et al., ICLR 2015).

    The convolution halves or doubles the map, or, without padding, narrows it by any number of pixels.

    Args:
        s_shape: shape of the student's map.
        t_shape: shape of the teacher's map.
        use_relu: end in a ReLU.

    Raises:
        InputError: the teacher's map is larger than the student's, but not twice as large.
    """

    def __init__(self, s_shape: Shape, t_shape: Shape, use_relu: bool = True):
        super().__init__()
        _check_maps("ConvReg", s_shape, t_shape)
        _, s_C, s_H, s_W = s_shape
        _, t_C, t_H, t_W = t_shape
        if (s_H, s_W) == (2 * t_H, 2 * t_W):
            self.conv = nn.Conv2d(s_C, t_C, kernel_size=3, stride=2, padding=1)
        elif (2 * s_H, 2 * s_W) == (t_H, t_W):
            self.conv = nn.ConvTranspose2d(s_C, t_C, kernel_size=4, stride=2, padding=1)
        elif s_H >= t_H and s_W >= t_W:
            self.conv = nn.Conv2d(s_C, t_C, kernel_size=(1 + s_H - t_H, 1 + s_W - t_W))
        else:
            raise InputError(
                f"ConvReg cannot enlarge a map {tuple(s_shape)} to {tuple(t_shape)}: only to twice its size"
            )
        self.bn = nn.BatchNorm2d(t_C)
        self.relu = nn.ReLU() if use_relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class _PerMap(nn.Module):
    """One connector for each of a student's maps."""

    def __init__(self, connectors: list[nn.Module]):
        super().__init__()
        self.connectors = nn.ModuleList(connectors)

    def forward(self, g_s: Sequence[Tensor]) -> list[Tensor]:
        if len(g_s) != len(self.connectors):
            raise InputError(f"{type(self).__name__} was built for {len(self.connectors)} maps, got {len(g_s)}")
        return [connector(f_s) for connector, f_s in zip(self.connectors, g_s, strict=True)]


class Connector(_PerMap):
    """A ``ConvReg`` without ReLU for each map; a pair of one shape needs none (AB, Heo et al., AAAI 2019).

    Args:
        s_shapes: shapes of the student's maps.
        t_shapes: shapes of as many teacher's maps.

    Raises:
        InputError: the numbers of maps differ; see also ``ConvReg``.
    """

    def __init__(self, s_shapes: Sequence[Shape], t_shapes: Sequence[Shape]):
        _check_pairs("Connector", s_shapes, t_shapes)
        super().__init__(
            [
                nn.Identity() if tuple(s)[1:] == tuple(t)[1:] else ConvReg(s, t, use_relu=False)
                for s, t in zip(s_shapes, t_shapes, strict=True)
            ]
        )


class ConnectorV2(_PerMap):
    """A 1 x 1 convolution and batch norm for each map, to the teacher's channels (OFD, Heo et al., ICCV 2019).

    Args:
        s_shapes: shapes of the student's maps.
        t_shapes: shapes of as many teacher's maps; their heights and widths are not read.

    Raises:
        InputError: the numbers of maps differ.
    """

    def __init__(self, s_shapes: Sequence[Shape], t_shapes: Sequence[Shape]):
        _check_pairs("ConnectorV2", s_shapes, t_shapes)
        _check_maps("ConnectorV2", *s_shapes, *t_shapes)
        super().__init__([self._connect(s[1], t[1]) for s, t in zip(s_shapes, t_shapes, strict=True)])

    @staticmethod
    def _connect(s_C: int, t_C: int) -> nn.Sequential:
        conv = nn.Conv2d(s_C, t_C, kernel_size=1, bias=False)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / t_C))
        return nn.Sequential(conv, nn.BatchNorm2d(t_C))


def _factor_layers(convs: list[nn.Module], use_bn: bool) -> nn.Sequential:
    layers = []
    for conv in convs:
        layers += [conv, nn.BatchNorm2d(conv.out_channels) if use_bn else nn.Identity(), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _factor_encoder(channels_in: int, t_shape: Shape, k: float, use_bn: bool) -> nn.Sequential:
    factor = int(t_shape[1] * k)
    if factor < 1:
        raise InputError(f"k = {k} leaves no channel of the teacher's map {tuple(t_shape)}")
    widths = [(channels_in, channels_in), (channels_in, factor), (factor, factor)]
    return _factor_layers([nn.Conv2d(*width, kernel_size=3, padding=1) for width in widths], use_bn)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's map; its code is the factor (Factor Transfer, Kim et al., NeurIPS 2018).

    Args:
        t_shape: shape of the teacher's map.
        k: the factor's channels as a share of the teacher's.
        use_bn: put batch norm after each convolution.
    """

    def __init__(self, t_shape: Shape, k: float = 0.5, use_bn: bool = False):
        super().__init__()
        _check_maps("Paraphraser", t_shape)
        t_C = t_shape[1]
        self.encoder = _factor_encoder(t_C, t_shape, k, use_bn)
        factor = int(t_C * k)
        widths = [(factor, factor), (factor, t_C), (t_C, t_C)]
        self.decoder = _factor_layers(
            [nn.ConvTranspose2d(*width, kernel_size=3, padding=1) for width in widths], use_bn
        )

    def forward(self, f_s: Tensor, is_factor: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the factor with ``is_factor``, otherwise (factor, the map decoded from it).

        Args:
            f_s: the teacher's map; the name is RepDistiller's.
        """
        factor = self.encoder(f_s)
        return factor if is_factor else (factor, self.decoder(factor))


class Translator(nn.Module):
    """Map the student's map to a factor of the teacher's shape (Factor Transfer, Kim et al., NeurIPS 2018).

    Args:
        s_shape: shape of the student's map.
        t_shape: shape of the teacher's map.
        k: the factor's channels as a share of the teacher's, as for ``Paraphraser``.
        use_bn: put batch norm after each convolution.
    """

    def __init__(self, s_shape: Shape, t_shape: Shape, k: float = 0.5, use_bn: bool = True):
        super().__init__()
        _check_maps("Translator", s_shape, t_shape)
        self.encoder = _factor_encoder(s_shape[1], t_shape, k, use_bn)

    def forward(self, f_s: Tensor) -> Tensor:
        return self.encoder(f_s)


class ABF(nn.Module):
    """ReviewKD's attention-based fusion of a stage's map with the map that the deeper stages pass on.

    Args:
        channels_in: channels of the student's map.
        channels_mid: channels of the map that is passed on.
        channels_out: channels of the teacher's map.
        fuse: False for the deepest stage, which gets no map.
    """

    def __init__(self, channels_in: int, channels_mid: int, channels_out: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels_in, channels_mid, kernel_size=1, bias=False), nn.BatchNorm2d(channels_mid)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels_mid, channels_out, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.att_conv = nn.Sequential(nn.Conv2d(2 * channels_mid, 2, kernel_size=1), nn.Sigmoid()) if fuse else None
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Shape) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's, and the map to pass on, both of height and width ``size``."""
        x = self.conv1(x)
        if self.att_conv is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            attention = self.att_conv(torch.cat([x, deeper], dim=1))
            x = x * attention[:, :1] + deeper * attention[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.conv2(x), x


class ReviewFusion(nn.Module):
    """A student's stages, fused from the last to the first, in the teacher's shapes (ReviewKD, Chen et al., CVPR 2021).

    Args:
        s_shapes: shapes of the student's maps, first stage first; the last may be the shape (N, C) of the pooled
            features, which the paper compares too.
        t_shapes: shapes of as many teacher's features.

    Raises:
        InputError: the numbers of features differ.
    """

    def __init__(self, s_shapes: Sequence[Shape], t_shapes: Sequence[Shape]):
        super().__init__()
        _check_pairs("ReviewFusion", s_shapes, t_shapes)
        s_shapes, t_shapes = (
            [(*s, 1, 1) if len(s) == 2 else tuple(s) for s in shapes] for shapes in (s_shapes, t_shapes)
        )
        _check_maps("ReviewFusion", *s_shapes, *t_shapes)
        channels_mid = min(512, s_shapes[-1][1])
        # They go from the last stage to the first, as in the published state dicts.
        self.abfs = nn.ModuleList(
            ABF(s[1], channels_mid, t[1], fuse=i > 0)
            for i, (s, t) in enumerate(zip(reversed(s_shapes), reversed(t_shapes), strict=True))
        )
        self.sizes = [torch.Size(t[2:]) for t in reversed(t_shapes)]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Turn the student's features into maps of the teacher's shapes, first stage first; pooled ones are 1 x 1."""
        if len(features) != len(self.abfs):
            raise InputError(f"ReviewFusion was built for {len(self.abfs)} features, got {len(features)}")
        fused, deeper = [], None
        for abf, f_s, size in zip(self.abfs, reversed(features), self.sizes, strict=True):
            out, deeper = abf(f_s[:, :, None, None] if f_s.dim() == 2 else f_s, deeper, size)
            fused.append(out)
        return fused[::-1]
