"""Knowledge Distillation Based on Transformed Teacher Matching (Zheng, Yang, ICLR 2024, arXiv 2402.11148)."""

import torch.nn.functional as F
from torch import Tensor, nn


def ttm_loss(logit_s: Tensor, logit_t: Tensor, gamma: float = 0.1, weighted: bool = False) -> Tensor:
    """KL divergence of the student from the teacher's probabilities raised to a power and normalised.

    The power is a temperature of 1 / gamma on the teacher's side alone. Nothing is multiplied by its square, so the
    weight of this loss is large, 45 in the authors' example.

    Args:
        logit_s: the student's logits, (B, classes); their temperature is 1.
        logit_t: the teacher's logits, (B, classes).
        gamma: the power.
        weighted: multiply each sample's divergence by its normaliser, which is larger for a smoother teacher (WTTM).

    Returns:
        Scalar, the mean over the batch.
    """
    power = gamma * F.log_softmax(logit_t, dim=1)
    normaliser = power.logsumexp(dim=1, keepdim=True)
    log_p = power - normaliser
    divergence = log_p.exp() * (log_p - F.log_softmax(logit_s, dim=1))
    if weighted:
        divergence = normaliser.exp() * divergence
    return divergence.sum() / len(logit_s)


class TTM(nn.Module):
    """``ttm_loss`` with its power, weighted or not."""

    def __init__(self, gamma: float = 0.1, weighted: bool = False):
        super().__init__()
        self.gamma = gamma
        self.weighted = weighted

    def forward(self, logit_s: Tensor, logit_t: Tensor) -> Tensor:
        return ttm_loss(logit_s, logit_t, self.gamma, self.weighted)
