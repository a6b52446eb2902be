"""From Knowledge Distillation to Self-Knowledge Distillation: NKD (Yang et al., ICCV 2023, arXiv 2303.13005)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nkd_terms(logit_s: Tensor, logit_t: Tensor, target: Tensor, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two parts of the loss: of the target class, and of the other classes among themselves.

    The second is a cross-entropy: the teacher's entropy is not taken off.

    Args:
        logit_s: the student's logits, (B, C).
        logit_t: the teacher's logits, (B, C).
        target: class indices, (B,).
        T: temperature of the second part, which is multiplied by its square.

    Returns:
        Two scalars, means over the batch.
    """
    dtype = torch.promote_types(logit_s.dtype, torch.float32)
    logit_s, logit_t, target = logit_s.to(dtype), logit_t.to(dtype), target[:, None]
    log_s, p_t = F.log_softmax(logit_s, dim=1).gather(1, target), F.softmax(logit_t, dim=1).gather(1, target)
    lowest = torch.finfo(dtype).min / 2
    others_s, others_t = ((x / T).scatter(1, target, lowest) for x in (logit_s, logit_t))
    # The target has no share; its logarithm must not overflow in the teacher's gradient.
    others = F.softmax(others_t, dim=1) * F.log_softmax(others_s, dim=1).scatter(1, target, 0)
    return -(p_t * log_s).mean(), -(T**2) * others.sum() / len(others)


class NKD(nn.Module):
    """The two parts of ``nkd_terms``, the second one weighted.

    Args:
        T: temperature of the second part; 1 in the authors' experiments on ImageNet, 3 on CIFAR-100.
        gamma: weight of the second part; 1.5 on ImageNet, 3.5 on CIFAR-100.
    """

    def __init__(self, T: float = 1.0, gamma: float = 1.5):
        super().__init__()
        self.T = T
        self.gamma = gamma

    def terms(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted parts by name; their sum is the loss."""
        of_target, others = nkd_terms(logit_s, logit_t, target, self.T)
        return {"target": of_target, "others": self.gamma * others}

    def forward(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (B, C) with targets (B,), a scalar."""
        return sum(self.terms(logit_s, logit_t, target).values())
