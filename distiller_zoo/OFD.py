"""A Comprehensive Overhaul of Feature Distillation (Heo, Kim, Yun, Park, Kwak, Choi, ICCV 2019, arXiv 1904.01866)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def ofd_margin(bn: nn.BatchNorm2d) -> Tensor:
    """The mean of the negative responses of each channel of a batch norm.

    A channel's response counts as normal, with the batch norm's bias as mean and its weight as standard deviation.
    A channel that is negative less than once in a thousand gets minus three standard deviations.

    Args:
        bn: the teacher's last batch norm before a stage's ReLU, of C channels.

    Returns:
        Margins (C,), without gradient and never positive.
    """
    mean, std = bn.bias.detach().double(), bn.weight.detach().double().abs()
    z = mean / std
    negative = torch.special.ndtr(-z)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    # A weight of zero makes z infinite or NaN; torch.where then takes the branch that holds the limit.
    return torch.where(negative > 0.001, mean - std * density / negative, -3 * std).to(bn.weight.dtype)


def ofd_loss(f_s: Tensor, f_t: Tensor, margin: float | Tensor) -> Tensor:
    """The partial squared distance of a pair of maps before their ReLU.

    The teacher's responses are raised to the margin where they are below it. A ReLU cannot tell student and teacher
    apart where the teacher's response is then not positive and the student's is not above it: nothing is counted there.

    Args:
        f_s: the student's map with the teacher's channels (``models.util.ConnectorV2``), (B, C, H, W).
        f_t: the teacher's map, (B, C, H', W'). Where sizes differ, the larger map is average-pooled to the smaller.
        margin: one for all channels, or one per channel, (C,).

    Returns:
        Scalar: the sum over channels and positions, the mean over the batch.

    Raises:
        ValueError: the numbers of samples or channels differ, or the margin has another length.
    """
    if f_s.dim() != 4 or f_t.dim() != 4 or f_s.shape[:2] != f_t.shape[:2]:
        shapes = f"{tuple(f_s.shape)} and {tuple(f_t.shape)}"
        raise ValueError(f"OFD needs maps of one batch size and one number of channels, got {shapes}")
    if isinstance(margin, Tensor):
        if margin.shape != f_s.shape[1:2]:
            raise ValueError(f"OFD needs a margin per channel, got {tuple(margin.shape)} for maps {tuple(f_s.shape)}")
        margin = margin[:, None, None]
    # The sum over a map soon overflows half precision.
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    f_s, f_t = f_s.to(dtype), f_t.to(dtype)
    if f_s.shape != f_t.shape:
        size = [min(sizes) for sizes in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
        f_s, f_t = F.adaptive_avg_pool2d(f_s, size), F.adaptive_avg_pool2d(f_t, size)
    f_t = f_t.clamp(min=margin).to(dtype)
    counted = (f_s > f_t) | (f_t > 0)
    return ((f_s - f_t) ** 2 * counted).sum() / len(f_s)


class OFD(nn.Module):
    """``ofd_loss`` over the stages; the last has weight 1, and each other half the weight of the next.

    Args:
        margins: ``ofd_margin`` of the teacher's batch norm of each stage, (C,).
    """

    def __init__(self, margins: Sequence[Tensor]):
        super().__init__()
        self.num_stages = len(margins)
        for i, margin in enumerate(margins, start=1):
            self.register_buffer(f"margin{i}", margin)

    def forward(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
        """The loss of the student's connected maps against the teacher's, first stage first, a scalar.

        Raises:
            ValueError: the numbers of maps and of margins differ; see also ``ofd_loss``.
        """
        n = self.num_stages
        if not len(maps_s) == len(maps_t) == n > 0:
            raise ValueError(f"OFD needs a map per margin, got {len(maps_s)} and {len(maps_t)} maps for {n} margins")
        return sum(
            ofd_loss(f_s, f_t, getattr(self, f"margin{i}")) / 2 ** (n - i)
            for i, (f_s, f_t) in enumerate(zip(maps_s, maps_t, strict=True), start=1)
        )
