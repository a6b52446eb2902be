"""ABKD: Pursuing a Proper Allocation of the Probability Mass (Wang et al., ICML 2025, arXiv 2505.04560)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _one_sided(log_p: Tensor, log_q: Tensor, power: float) -> Tensor:
    """The limit of the divergence where the power of the first distribution goes to zero."""
    difference = power * (log_q - log_p)
    return ((power * log_q).exp() * (difference - 1) + (power * log_p).exp()) / power


def alpha_beta_divergence(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """The alpha-beta divergence of q from p, class by class, with its limits.

    (1, 0) is the KL divergence, (0, 1) the reverse one, (½, ½) a squared Hellinger distance and (1, 1) half the squared
    error. Where beta is -alpha, the authors' code and this one give alpha times the limit.

    Args:
        log_p: the teacher's log-probabilities, (B, classes).
        log_q: the student's log-probabilities, (B, classes).
        alpha: power of the teacher's probabilities.
        beta: power of the student's probabilities.

    Returns:
        Summands of the divergence, (B, classes).
    """
    if alpha == beta == 0:
        return (log_q - log_p).square() / 2
    if alpha == 0:
        return _one_sided(log_p, log_q, beta)
    if beta == 0:
        return _one_sided(log_q, log_p, alpha)
    if alpha == -beta:
        ratio = alpha * (log_q - log_p)
        return (ratio + (-ratio).exp() - 1) / alpha
    total = alpha + beta
    alike = alpha / total * (total * log_p).exp() + beta / total * (total * log_q).exp()
    return (alike - (alpha * log_p + beta * log_q).exp()) / (alpha * beta)


def abkd_loss(logit_s: Tensor, logit_t: Tensor, alpha: float = 0.8, beta: float = 0.3, T: float = 4.0) -> Tensor:
    """``alpha_beta_divergence`` of softened class distributions; nothing is multiplied by T squared.

    Args:
        logit_s: the student's logits, (B, classes).
        logit_t: the teacher's logits, (B, classes).
        alpha, beta: powers of the teacher's and of the student's probabilities.
        T: temperature.

    Returns:
        Scalar, the mean over the batch.
    """
    dtype = torch.promote_types(logit_s.dtype, torch.float32)
    log_p, log_q = (F.log_softmax(x.to(dtype) / T, dim=1) for x in (logit_t, logit_s))
    return alpha_beta_divergence(log_p, log_q, alpha, beta).sum() / len(logit_s)


class ABKD(nn.Module):
    """``abkd_loss`` with its powers and its temperature."""

    def __init__(self, alpha: float = 0.8, beta: float = 0.3, T: float = 4.0):
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.T = T

    def forward(self, logit_s: Tensor, logit_t: Tensor) -> Tensor:
        return abkd_loss(logit_s, logit_t, self.alpha, self.beta, self.T)
