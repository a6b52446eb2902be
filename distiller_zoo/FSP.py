"""A gift from knowledge distillation: fast optimization, network minimization and transfer learning (Yim, Joo, Bae,
Kim, CVPR 2017)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fsp_matrix(bottom: Tensor, top: Tensor) -> Tensor:
    """The flow between two layers: products of their channels, averaged over pixels (Yim et al., equation 1).

    The larger maps are average-pooled to the size of the smaller.

    Args:
        bottom: maps, (B, C, H, W).
        top: maps, (B, C', H', W').

    Returns:
        (B, C, C').
    """
    size = [min(sides) for sides in zip(bottom.shape[2:], top.shape[2:], strict=True)]
    bottom, top = (f if list(f.shape[2:]) == size else F.adaptive_avg_pool2d(f, size) for f in (bottom, top))
    return bottom.flatten(2) @ top.flatten(2).mT / (size[0] * size[1])


def fsp_loss(g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
    """Mean squared difference of the FSP matrices of student and teacher, for each two layers in a row.

    Args:
        g_s: the student's maps, (B, C, H, W) each.
        g_t: the teacher's, as many, each with the B and C of the student's; H and W may differ. Gradients flow to
            both.

    Returns:
        Scalars, one fewer than layers.

    Raises:
        ValueError: for lists of different lengths, or maps that do not go together.
    """
    if len(g_s) != len(g_t):
        raise ValueError(f"FSP needs as many student as teacher layers, got {len(g_s)} and {len(g_t)}")
    for f_s, f_t in zip(g_s, g_t, strict=True):
        if f_s.dim() != 4 or f_t.dim() != 4 or f_s.shape[:2] != f_t.shape[:2]:
            raise ValueError(
                f"FSP needs two (B, C, H, W) tensors of one B and C, got {tuple(f_s.shape)} and {tuple(f_t.shape)}"
            )
    losses = []
    for (bottom_s, top_s), (bottom_t, top_t) in zip(pairwise(g_s), pairwise(g_t), strict=True):
        with torch.autocast(top_s.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(top_s.dtype, top_t.dtype), torch.float32)
            flow_s = fsp_matrix(bottom_s.to(dtype), top_s.to(dtype))
            losses.append(F.mse_loss(flow_s, fsp_matrix(bottom_t.to(dtype), top_t.to(dtype))))
    return losses


class FSP(nn.Module):
    """``fsp_loss``; channels that do not match are refused when it is built.

    Args:
        s_shapes: shapes of the student's maps, (B, C, H, W) each.
        t_shapes: of the teacher's.

    Raises:
        ValueError: for different numbers of layers, or of channels in one of them.
    """

    def __init__(self, s_shapes: list[tuple[int, ...]], t_shapes: list[tuple[int, ...]]):
        super().__init__()
        channels_s, channels_t = [shape[1] for shape in s_shapes], [shape[1] for shape in t_shapes]
        if channels_s != channels_t:
            raise ValueError(f"FSP needs the same channels in both networks' layers, got {channels_s} and {channels_t}")

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        return fsp_loss(g_s, g_t)
