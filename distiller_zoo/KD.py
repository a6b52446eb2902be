"""Distilling the knowledge in a neural network (Hinton et al., 2015, arXiv 1503.02531)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A row counts as constant if its centred norm is at most this share of its norm.
_CONSTANT = 1e-6


def kd_loss(logit_s: Tensor, logit_t: Tensor, T: float = 4.0) -> Tensor:
    """KL divergence of the softened class distributions, times T squared (Hinton et al., section 2).

    Args:
        logit_s: the student's logits, (B, classes).
        logit_t: the teacher's logits, (B, classes).
        T: temperature.

    Returns:
        Scalar, the mean over the batch.
    """
    log_p_s = F.log_softmax(logit_s / T, dim=1)
    log_p_t = F.log_softmax(logit_t / T, dim=1)
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True) * T**2


def standardize_logits(logits: Tensor) -> Tensor:
    """Centre each row and divide it by its standard deviation, before ``kd_loss`` of student and teacher.

    The student then learns how the teacher's logits relate, whatever their range (Logit Standardization in Knowledge
    Distillation, Sun, Ren, Li, Wang, Cao, CVPR 2024, arXiv 2403.01427).

    Args:
        logits: (B, classes).

    Returns:
        Rows of mean 0 and unbiased standard deviation 1, (B, classes); a constant row becomes zero, with zero
        gradient.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    with torch.no_grad():
        norm = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
        constant = torch.linalg.vector_norm(centred, dim=1, keepdim=True) <= _CONSTANT * norm
    centred = centred.masked_fill(constant, 0)
    std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(max(logits.shape[1] - 1, 1))
    return centred / (std + 1e-7)


class DistillKL(nn.Module):
    """``kd_loss`` at a temperature."""

    def __init__(self, T: float = 4.0):
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kd_loss(y_s, y_t, self.T)
