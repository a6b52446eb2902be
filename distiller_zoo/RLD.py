"""Knowledge Distillation with Refined Logits (Sun et al., ICCV 2025, arXiv 2408.07703)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _confidence_divergence(z_s: Tensor, z_t: Tensor, target: Tensor) -> Tensor:
    """KL divergence of (target, others) from (the teacher's most likely class, others), the mean over the batch."""
    log_q, log_p, tiny = F.log_softmax(z_s, dim=1), F.log_softmax(z_t, dim=1).amax(dim=1), torch.finfo(z_s.dtype).tiny
    target = target[:, None]
    # A sum of the others, not 1 - q, which a student that is certain rounds to zero.
    log_others = log_q.exp().scatter(1, target, 0).sum(dim=1).clamp_min(tiny).log()
    others = -log_p.expm1()
    of_others = others * (others.clamp_min(tiny).log() - log_others)
    return (log_p.exp() * (log_p - log_q.gather(1, target).squeeze(1)) + of_others).mean()


def rld_terms(
    logit_s: Tensor, logit_t: Tensor, target: Tensor, T: float = 4.0, alpha_T: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two parts of the loss, each times its temperature squared, not weighted.

    The first compares the student's confidence in the target with the teacher's in whatever it finds most likely. The
    second compares the classes that the teacher finds less likely than the target. Where the teacher is right, this
    is DKD.

    Args:
        logit_s: the student's logits, (B, C).
        logit_t: the teacher's logits, (B, C).
        target: class indices, (B,).
        T: temperature of the second part.
        alpha_T: temperature of the first part.

    Returns:
        Two scalars, means over the batch. The second part of a sample without such a class is zero.
    """
    dtype = torch.promote_types(logit_s.dtype, torch.float32)
    logit_s, logit_t = logit_s.to(dtype), logit_t.to(dtype)
    left_out = logit_t >= logit_t.gather(1, target[:, None])
    # Low enough that a left-out class's probability is zero, and finite, so that two of them differ by zero.
    lowest = torch.finfo(dtype).min / 2
    rest_s, rest_t = (F.log_softmax((x / T).masked_fill(left_out, lowest), dim=1) for x in (logit_s, logit_t))
    confidence = _confidence_divergence(logit_s / alpha_T, logit_t / alpha_T, target) * alpha_T**2
    return confidence, F.kl_div(rest_s, rest_t, reduction="batchmean", log_target=True) * T**2


class RLD(nn.Module):
    """The two weighted parts of ``rld_terms``.

    Args:
        alpha: weight of the confidence.
        beta: weight of the other classes; 8 in the code that made the published numbers.
        T: temperature of the other classes.
        alpha_T: temperature of the confidence.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0, alpha_T: float = 1.0):
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.T = T
        self.alpha_T = alpha_T

    def terms(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted parts by name; their sum is the loss."""
        confidence, rest = rld_terms(logit_s, logit_t, target, self.T, self.alpha_T)
        return {"confidence": self.alpha * confidence, "rest": self.beta * rest}

    def forward(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (B, C) with targets (B,), a scalar."""
        return sum(self.terms(logit_s, logit_t, target).values())
