"""Centred kernel alignment (Kornblith et al., ICML 2019, arXiv 1905.00414) as a loss, linear."""

import torch
from torch import Tensor, nn


def cka_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """One minus the linear CKA of two batches, which is the cosine of their samples' centred Gram matrices.

    RCKA (Zhou et al., IJCAI 2024) goes by this name, but its code neither centres nor divides by both norms.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's, (B, D').

    Returns:
        Scalar from 0 for embeddings that agree up to a rotation and a scale, to 1.
    """
    s, t = f_s - f_s.mean(dim=0), f_t - f_t.mean(dim=0)
    if len(s) <= min(s.shape[1], t.shape[1]):
        gram_s, gram_t = s @ s.T, t @ t.T
        alike = (gram_s * gram_t).sum()
    else:  # the products of dimensions have the same norms and are smaller
        gram_s, gram_t = s.T @ s, t.T @ t
        alike = (s.T @ t).square().sum()
    norms = torch.linalg.matrix_norm(gram_s) * torch.linalg.matrix_norm(gram_t)
    return 1 - alike / norms.clamp_min(torch.finfo(norms.dtype).tiny)


class CKA(nn.Module):
    """``cka_loss`` as a module."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return cka_loss(f_s, f_t)
