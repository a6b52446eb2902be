"""Paraphrasing complex network: network compression via factor transfer (Kim, Park, Kwak, NeurIPS 2018,
arXiv 1802.04977)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _factor(f: Tensor, size: list[int], p1: float) -> Tensor:
    """The channels' mean p1-th power at every pixel of maps pooled to ``size``, scaled to unit norm, (B, H * W)."""
    if list(f.shape[2:]) != size:
        f = F.adaptive_avg_pool2d(f, size)
    # A mean's backward pass would fill a tensor of the maps' size; a sum's only expands one.
    return F.normalize((f.pow(p1).sum(1) / f.shape[1]).flatten(1))


def factor_loss(f_s: Tensor, f_t: Tensor, p1: float = 2, p2: float = 1) -> Tensor:
    """Mean p2-th power of the difference of two factors (Kim et al., equation 3, in RepDistiller's form).

    A factor is the mean of the channels' p1-th powers at every pixel, scaled to unit norm. Maps of zeros have a factor
    of zeros. The larger maps are average-pooled to the size of the smaller.

    Args:
        f_s: output of the student's translator, (B, C, H, W).
        f_t: output of the teacher's paraphraser, (B, C', H', W'). Gradients flow to both.
        p1: power of the features, a whole number of at least 1.
        p2: power of the difference: 1 for its absolute value, else an even number.

    Returns:
        Scalar, the mean over samples and pixels.

    Raises:
        ValueError: the tensors are not maps of the same number of samples.
    """
    if f_s.dim() != 4 or f_t.dim() != 4 or len(f_s) != len(f_t):
        raise ValueError(
            f"factors need two (B, C, H, W) tensors of one B, got {tuple(f_s.shape)} and {tuple(f_t.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    size = [min(sides) for sides in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    difference = _factor(f_s.to(dtype), size, p1) - _factor(f_t.to(dtype), size, p1)
    return (difference.abs() if p2 == 1 else difference.pow(p2)).mean()


class FactorTransfer(nn.Module):
    """``factor_loss`` at two powers."""

    def __init__(self, p1: float = 2, p2: float = 1):
        super().__init__()
        self.p1 = p1
        self.p2 = p2

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return factor_loss(f_s, f_t, self.p1, self.p2)
