"""Understanding the Role of the Projector in Distillation: SRD (Miles, Mikolajczyk, AAAI 2024, arXiv 2303.11098)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Batch norm without an affine map, by the batch's own statistics, (B, D)."""
    # PyTorch's own refuses a single sample, which is its own mean.
    return F.batch_norm(x, None, None, training=True, eps=eps) if len(x) > 1 else x - x


def srd_loss(z_s: Tensor, z_t: Tensor, exponent: float = 4.0, eps: float = 1e-4) -> Tensor:
    """Logarithm of the summed powers of the differences between two normalised batches.

    Because of the logarithm, the gradient's size does not follow that of the differences.

    Args:
        z_s: the student's embeddings, projected to the teacher's width, (B, D).
        z_t: the teacher's embeddings, (B, D).
        exponent: of the absolute differences.
        eps: added to the variances.

    Returns:
        Scalar, over all elements.
    """
    difference = _normalized(z_s, eps) - _normalized(z_t, eps)
    total = difference.abs().pow(exponent).sum()
    return total.clamp_min(torch.finfo(total.dtype).tiny).log()


class SRD(nn.Module):
    """``srd_loss`` of linearly projected embeddings.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's.
        exponent, eps: see ``srd_loss``.
    """

    def __init__(self, s_dim: int, t_dim: int, exponent: float = 4.0, eps: float = 1e-4):
        super().__init__()
        self.embed = nn.Linear(s_dim, t_dim)
        self.exponent = exponent
        self.eps = eps

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of embeddings (B, s_dim) against (B, t_dim), a scalar."""
        return srd_loss(self.embed(f_s), f_t, self.exponent, self.eps)
