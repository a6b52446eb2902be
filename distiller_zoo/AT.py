"""Paying more attention to attention: improving the performance of convolutional neural networks via attention
transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _attention(f: Tensor, size: list[int], p: float) -> Tensor:
    """The channels' mean p-th power at every pixel of maps pooled to ``size``, scaled to unit norm, (B, H * W)."""
    if list(f.shape[2:]) != size:
        f = F.adaptive_avg_pool2d(f, size)
    # A mean's backward pass would fill a tensor of the maps' size; a sum's only expands one.
    return F.normalize((f.pow(p).sum(1) / f.shape[1]).flatten(1))


def attention_loss(f_s: Tensor, f_t: Tensor, p: float = 2) -> Tensor:
    """Mean squared difference of two attention maps (Zagoruyko and Komodakis, equation 2, as in RepDistiller).

    An attention map is the mean of the channels' p-th powers at every pixel, scaled to unit norm. Maps of zeros have
    an attention map of zeros. The larger maps are average-pooled to the size of the smaller.

    Args:
        f_s: the student's maps, (B, C, H, W).
        f_t: the teacher's maps, (B, C', H', W'). Gradients flow to both.
        p: the power, a whole number of at least 1.

    Returns:
        Scalar, the mean over samples and pixels.

    Raises:
        ValueError: the tensors are not maps of the same number of samples.
    """
    if f_s.dim() != 4 or f_t.dim() != 4 or len(f_s) != len(f_t):
        raise ValueError(
            f"attention needs two (B, C, H, W) tensors of one B, got {tuple(f_s.shape)} and {tuple(f_t.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    size = [min(sides) for sides in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    return F.mse_loss(_attention(f_s.to(dtype), size, p), _attention(f_t.to(dtype), size, p))


class Attention(nn.Module):
    """``attention_loss`` of each pair of layers, at a power."""

    def __init__(self, p: float = 2):
        super().__init__()
        self.p = p

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        """One loss per pair; as in RepDistiller, the longer list's last layers are left out."""
        return [attention_loss(f_s, f_t, self.p) for f_s, f_t in zip(g_s, g_t, strict=False)]
