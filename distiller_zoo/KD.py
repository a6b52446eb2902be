"""Distilling the knowledge in a neural network (Hinton et al., 2015, arXiv 1503.02531)."""

import torch.nn.functional as F
from torch import Tensor, nn


def kd_loss(logit_s: Tensor, logit_t: Tensor, T: float = 4.0) -> Tensor:
    """KL divergence of the softened class distributions, times T squared (Hinton et al., section 2).

    Args:
        logit_s: the student's logits, (B, classes).
        logit_t: the teacher's, (B, classes).
        T: temperature.

    Returns:
        Scalar, the mean over the batch.
    """
    log_p_s = F.log_softmax(logit_s / T, dim=1)
    log_p_t = F.log_softmax(logit_t / T, dim=1)
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True) * T**2


class DistillKL(nn.Module):
    """``kd_loss`` at a temperature."""

    def __init__(self, T: float = 4.0):
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kd_loss(y_s, y_t, self.T)
