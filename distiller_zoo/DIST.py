"""Knowledge Distillation from A Stronger Teacher (Huang, You, Wang, Qian, Xu, NeurIPS 2022, arXiv 2205.10536)."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A row counts as constant if its centred norm is at most this share of its norm.
_CONSTANT = 1e-6


def _centre(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows minus their means, their norms (B, 1), and which of them are not constant."""
    mean = p.mean(dim=1, keepdim=True)
    centred = p - mean
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # The norm of a constant row is its mean's times the square root of its length.
    return centred, norm, norm > _CONSTANT * math.sqrt(p.shape[1]) * mean.abs()


class _Distance(torch.autograd.Function):
    """One minus the mean Pearson correlation of the rows of both; a constant row correlates with nothing.

    This backward makes half as many passes over the short rows as autograd would.
    """

    @staticmethod
    def forward(ctx, p_s: Tensor, p_t: Tensor) -> Tensor:
        (p_s, norm_s, varies_s), (p_t, norm_t, varies_t) = _centre(p_s), _centre(p_t)
        scale = torch.where(varies_s & varies_t, 1 / (norm_s * norm_t + 1e-8), 0)
        correlation = (p_s * p_t).sum(dim=1, keepdim=True) * scale
        ctx.save_for_backward(p_s, p_t, norm_s, norm_t, scale, correlation)
        return 1 - correlation.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p_s, p_t, norm_s, norm_t, scale, correlation = ctx.saved_tensors
        slope = scale * (grad / -len(p_s))
        # The derivative of the norms' product; both results are centred, since p_s and p_t are.
        shrink = slope * correlation
        pairs = ((p_s, norm_s, p_t, norm_t), (p_t, norm_t, p_s, norm_s))
        return tuple(
            slope * other - torch.where(scale > 0, shrink * norm_other / norm, 0) * own if needed else None
            for needed, (own, norm, other, norm_other) in zip(ctx.needs_input_grad, pairs, strict=True)
        )


def dist_terms(logit_s: Tensor, logit_t: Tensor, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """The inter-class and the intra-class loss, times T squared, not weighted.

    The first correlates student and teacher over the classes of each sample, the second over the samples of each
    class. In a batch of one nothing varies within a class: the second loss is T squared, without a gradient.

    Args:
        logit_s: the student's logits, (B, C).
        logit_t: the teacher's, (B, C).
        T: temperature of the softmax.

    Returns:
        (inter-class, intra-class), scalars.

    Raises:
        ValueError: for two tensors that are not of one shape (B, C).
    """
    if logit_s.dim() != 2 or logit_s.shape != logit_t.shape:
        raise ValueError(
            f"DIST needs logits of one shape (B, C), got {tuple(logit_s.shape)} and {tuple(logit_t.shape)}"
        )
    p_s, p_t = (
        (logit.to(torch.promote_types(logit.dtype, torch.float32)) / T).softmax(dim=1) for logit in (logit_s, logit_t)
    )
    return T**2 * _Distance.apply(p_s, p_t), T**2 * _Distance.apply(p_s.T, p_t.T)


def dist_loss(logit_s: Tensor, logit_t: Tensor, beta: float = 1.0, gamma: float = 1.0, T: float = 1.0) -> Tensor:
    """``beta`` times the inter-class and ``gamma`` times the intra-class loss of ``dist_terms``, a scalar."""
    inter, intra = dist_terms(logit_s, logit_t, T)
    return beta * inter + gamma * intra


class DIST(nn.Module):
    """``dist_loss`` with its weights and temperature.

    Args:
        beta: weight of the inter-class loss.
        gamma: weight of the intra-class loss.
        T: temperature of the softmax.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, T: float = 1.0):
        super().__init__()
        self.beta = beta
        self.gamma = gamma
        self.T = T

    def terms(self, logit_s: Tensor, logit_t: Tensor) -> dict[str, Tensor]:
        """The two weighted losses by name; their sum is the loss."""
        inter, intra = dist_terms(logit_s, logit_t, self.T)
        return {"inter": self.beta * inter, "intra": self.gamma * intra}

    def forward(self, logit_s: Tensor, logit_t: Tensor) -> Tensor:
        """The loss of student logits (B, C) against teacher logits (B, C), a scalar."""
        return dist_loss(logit_s, logit_t, self.beta, self.gamma, self.T)
