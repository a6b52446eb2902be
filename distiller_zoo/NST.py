"""Like what you like: knowledge distill via neuron selectivity transfer (Huang, Wang, 2017, arXiv 1707.01219)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _channels(f: Tensor, size: list[int]) -> Tensor:
    """Every channel of maps pooled to ``size``, scaled to unit norm, (B, C, H * W)."""
    if list(f.shape[2:]) != size:
        f = F.adaptive_avg_pool2d(f, size)
    return F.normalize(f.flatten(2), dim=2)


def nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the student's channels and the teacher's (Huang and Wang, section 4).

    A channel is a sample of a distribution over pixels: its map, scaled to unit norm. The kernel is
    ``k(x, y) = (x · y)²``, averaged over pairs of channels. The larger maps are average-pooled to the size of
    the smaller; a channel of zeros stays zero.

    Args:
        f_s: the student's maps, (B, C, H, W).
        f_t: the teacher's maps, (B, C', H', W'). Gradients flow to both.

    Returns:
        Scalar, the mean over samples.

    Raises:
        ValueError: the tensors are not maps of the same number of samples.
    """
    if f_s.dim() != 4 or f_t.dim() != 4 or len(f_s) != len(f_t):
        raise ValueError(f"NST needs two (B, C, H, W) tensors of one B, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
        size = [min(sides) for sides in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
        s, t = _channels(f_s.to(dtype), size), _channels(f_t.to(dtype), size)
        if s.shape[2] < max(s.shape[1], t.shape[1]):
            # With few pixels, the sum of (x · y)² over channels is cheaper as a product of two pixel by pixel matrices.
            moments = s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]
            return moments.square().sum() / len(s)
        within_s, within_t, across = ((x @ y.mT).square().mean() for x, y in ((s, s), (t, t), (s, t)))
        return within_s + within_t - 2 * across


class NSTLoss(nn.Module):
    """``nst_loss`` of each pair of layers."""

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        """One loss per pair; as in RepDistiller, the longer list's last layers are left out."""
        return [nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]
