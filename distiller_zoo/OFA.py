"""One-for-All: the loss on logits (Hao et al., NeurIPS 2023, arXiv 2310.19444)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def ofa_loss(logit_s: Tensor, logit_t: Tensor, target: Tensor, eps: float = 1.0, T: float = 1.0) -> Tensor:
    """Cross-entropy with the teacher's probabilities, the target's raised.

    The power enlarges the share of the target where the teacher is sure of it. With a power of 1 this is a plain
    cross-entropy. The authors' branches at the student's stages are left out.

    Args:
        logit_s: the student's logits, (B, classes).
        logit_t: the teacher's, (B, classes).
        target: class indices, (B,).
        eps: the power.
        T: temperature of both sides.

    Returns:
        Scalar, the mean over the batch.
    """
    own = torch.zeros_like(logit_t).scatter(1, target[:, None], 1)
    soft = (F.softmax(logit_t / T, dim=1) + own).pow(eps) - own
    return F.cross_entropy(logit_s / T, soft)


class OFA(nn.Module):
    """``ofa_loss`` with its power and its temperature."""

    def __init__(self, eps: float = 1.0, T: float = 1.0):
        super().__init__()
        self.eps = eps
        self.T = T

    def forward(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
        return ofa_loss(logit_s, logit_t, target, self.eps, self.T)
