"""Similarity-preserving knowledge distillation (Tung, Mori, ICCV 2019, arXiv 1907.09682)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _similarities(f: Tensor) -> Tensor:
    """The inner products of the samples, each row scaled to unit norm, (B, B)."""
    f = f.flatten(1)
    products = f @ f.T
    norm = torch.linalg.vector_norm(products, dim=1, keepdim=True)
    # A sample of zeros has a row of zeros, whatever divides it: dividing by infinity gives no gradient, by 1e-12 a huge
    # one.
    return products / norm.clamp_min(1e-12).masked_fill(norm == 0, torch.inf)


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared difference of the samples' similarities, student against teacher (Tung and Mori, equation 4).

    A sample's similarities are its inner products with all samples of the batch, scaled to unit norm. A sample of
    zeros has similarities of zero, without gradient.

    Args:
        f_s: the student's features, (B, ...): maps or embeddings, which are flattened.
        f_t: the teacher's features, (B, ...), of any size. Gradients flow to both.

    Returns:
        Scalar, the mean over the B * B pairs.

    Raises:
        ValueError: the batches' sizes differ, or a tensor has fewer than two dimensions.
    """
    if min(f_s.dim(), f_t.dim()) < 2 or len(f_s) != len(f_t):
        raise ValueError(f"similarity needs two batches of one size, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
        return F.mse_loss(_similarities(f_s.to(dtype)), _similarities(f_t.to(dtype)))


class Similarity(nn.Module):
    """``similarity_loss`` of each pair of layers."""

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        """One loss per pair; as in RepDistiller, the longer list's last layers are left out."""
        return [similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]
