"""Information Theoretic Representation Distillation (Miles et al., BMVC 2022, arXiv 2112.00459)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _standardized(x: Tensor) -> Tensor:
    """Columns (B, D) of mean 0 and unbiased standard deviation 1; a constant column becomes zero, without gradient."""
    x = x - x.mean(dim=0)
    square = x.square().sum(dim=0)
    varies = square > torch.finfo(x.dtype).tiny
    return torch.where(varies, x, 0) * (max(len(x) - 1, 1) / square.where(varies, 1)).sqrt()


def correlation_loss(z_s: Tensor, z_t: Tensor, alpha: float = 1.5) -> Tensor:
    """How little the student's dimensions correlate, over the batch, with the teacher's same ones (ITRD, section 4.1).

    As in the authors' code the covariance is divided by B and the standard deviations by B - 1, so that equal
    embeddings correlate by (B - 1) / B.

    Args:
        z_s: the student's embeddings, projected to the teacher's width, (B, D).
        z_t: the teacher's embeddings, (B, D).
        alpha: Rényi's order, which weighs the misses.

    Returns:
        Scalar, a logarithm.
    """
    r = (_standardized(z_s) * _standardized(z_t)).mean(dim=0)
    return (1 - r).abs().pow(2 * alpha).sum().log2()


def mutual_loss(z_s: Tensor, z_t: Tensor) -> Tensor:
    """How much more the student's Gram matrix says than its product with the teacher's (ITRD, section 4.2).

    Args:
        z_s: the student's embeddings, (B, D).
        z_t: the teacher's embeddings, (B, D').

    Returns:
        Scalar.
    """
    n_s, n_t = F.normalize(z_s, dim=1), F.normalize(z_t, dim=1)
    gram_s = n_s @ n_s.T
    gram_st = gram_s * (n_t @ n_t.T)
    gram_s, gram_st = (gram / gram.trace().clamp_min(1e-12) for gram in (gram_s, gram_st))
    return gram_s.square().sum() - gram_st.square().sum()


class ITRD(nn.Module):
    """``correlation_loss`` and ``mutual_loss`` of linearly projected embeddings.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's.
        alpha: see ``correlation_loss``.
        weights: of the two terms; the authors' are 2 and 0.05.
    """

    def __init__(self, s_dim: int, t_dim: int, alpha: float = 1.5, weights: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        self.embed = nn.Linear(s_dim, t_dim)
        self.alpha = alpha
        self.weights = weights

    def terms(self, f_s: Tensor, f_t: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss."""
        z_s = self.embed(f_s)
        correlation = correlation_loss(z_s, f_t, self.alpha)
        # As in the authors' code, embeddings of the teacher's width need no projection here.
        mutual = mutual_loss(f_s if f_s.shape == f_t.shape else z_s, f_t)
        return {"correlation": self.weights[0] * correlation, "mutual": self.weights[1] * mutual}

    def forward(self, f_s: Tensor, f_t: Tensor) -> list[Tensor]:
        """The weighted terms of embeddings (B, s_dim) against (B, t_dim)."""
        return list(self.terms(f_s, f_t).values())
