"""Distilling Knowledge via Knowledge Review (Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _pair_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    if f_s.shape != f_t.shape or f_s.dim() != 4:
        raise ValueError(f"HCL needs maps of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    f_s, f_t = f_s.to(dtype), f_t.to(dtype)
    loss, weight, total = F.mse_loss(f_s, f_t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < f_s.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(f_s, size), F.adaptive_avg_pool2d(f_t, size))
    return loss / total


def _as_map(f: Tensor) -> Tensor:
    return f[:, :, None, None] if f.dim() == 2 else f


def hcl_loss(maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
    """The hierarchical context loss, summed over pairs of maps.

    A pair's loss is a weighted mean of mean squared errors: of the maps, and of the maps pooled to 4 x 4, 2 x 2 and
    1 x 1. Each has half the weight of the one before; sizes that are no smaller than the map are left out.

    Args:
        maps_s: the student's maps, (B, C, H, W) each, fused to the teacher's shapes (``models.util.ReviewFusion``).
        maps_t: the teacher's maps, of the same shapes in the same order. A pooled vector (B, C) counts as a 1 x 1 map.

    Returns:
        Scalar.

    Raises:
        ValueError: there are no maps, the numbers of maps differ, or the shapes of a pair do.
    """
    if not maps_s or len(maps_s) != len(maps_t):
        raise ValueError(f"HCL needs as many student as teacher maps, got {len(maps_s)} and {len(maps_t)}")
    return sum(_pair_loss(_as_map(f_s), _as_map(f_t)) for f_s, f_t in zip(maps_s, maps_t, strict=True))


class HCL(nn.Module):
    """``hcl_loss`` as a module."""

    def forward(self, maps_s: Sequence[Tensor], maps_t: Sequence[Tensor]) -> Tensor:
        return hcl_loss(maps_s, maps_t)
