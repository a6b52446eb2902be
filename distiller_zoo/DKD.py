"""Decoupled Knowledge Distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022, arXiv 2203.08679)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _split(logits: Tensor, target: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target class, all others together), (B, 2), and of the others among them, (B, C)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / T
    target = target[:, None]
    # Low enough that its probability is zero, and finite, so that the difference of two of them is zero too.
    others = z.scatter(1, target, torch.finfo(z.dtype).min / 2)
    rest = others.logsumexp(dim=1, keepdim=True)
    binary = torch.cat([z.gather(1, target), rest], dim=1)
    return F.log_softmax(binary, dim=1), others - rest


def dkd_terms(logit_s: Tensor, logit_t: Tensor, target: Tensor, T: float = 4.0) -> tuple[Tensor, Tensor]:
    """The two parts of the distillation loss, times T squared, not weighted.

    The first compares how likely the target class is against all others, the second how the others share what it
    leaves. All is computed from log-probabilities, so that teachers and students that are certain are no exception.

    Args:
        logit_s: the student's logits, (B, C).
        logit_t: the teacher's, (B, C).
        target: class indices, (B,).
        T: temperature.

    Returns:
        (target-class KL divergence, non-target-class KL divergence), scalars, means over the batch.

    Raises:
        ValueError: for logits that are not of one shape (B, C), or of less than two classes.
    """
    if logit_s.dim() != 2 or logit_s.shape != logit_t.shape or logit_s.shape[1] < 2:
        shapes = f"{tuple(logit_s.shape)} and {tuple(logit_t.shape)}"
        raise ValueError(f"DKD needs logits of one shape (B, C) with two classes or more, got {shapes}")
    pairs = zip(_split(logit_s, target, T), _split(logit_t, target, T), strict=True)
    tckd, nckd = (F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2 for log_s, log_t in pairs)
    return tckd, nckd


def dkd_loss(
    logit_s: Tensor, logit_t: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0
) -> Tensor:
    """``alpha`` times the target-class and ``beta`` times the non-target-class part of ``dkd_terms``, a scalar."""
    tckd, nckd = dkd_terms(logit_s, logit_t, target, T)
    return alpha * tckd + beta * nckd


class DKD(nn.Module):
    """``dkd_loss`` with its weights and temperature.

    Args:
        alpha: weight of the target-class part.
        beta: weight of the non-target-class part.
        T: temperature.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0):
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.T = T

    def terms(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The two weighted parts by name; their sum is the loss."""
        tckd, nckd = dkd_terms(logit_s, logit_t, target, self.T)
        return {"tckd": self.alpha * tckd, "nckd": self.beta * nckd}

    def forward(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
        """The loss of student logits (B, C) against teacher logits (B, C) with targets (B,), a scalar."""
        return dkd_loss(logit_s, logit_t, target, self.alpha, self.beta, self.T)
