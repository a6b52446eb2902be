"""Multi-Level Logit Distillation (Jin et al., CVPR 2023)."""

import torch.nn.functional as F
from torch import Tensor, nn


def _instance(log_s: Tensor, log_t: Tensor, T: float) -> Tensor:
    """KL divergence of log-probabilities at a temperature times T squared, the mean over the batch."""
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2


def class_loss(p_s: Tensor, p_t: Tensor) -> Tensor:
    """Squared distance of the classes' Gram matrices of probabilities (B, classes), over the number of classes."""
    return (p_s.T @ p_s - p_t.T @ p_t).square().sum() / p_s.shape[1]


def batch_loss(p_s: Tensor, p_t: Tensor) -> Tensor:
    """Squared distance of the samples' Gram matrices of probabilities (B, classes), over the number of samples."""
    return (p_s @ p_s.T - p_t @ p_t.T).square().sum() / len(p_s)


def shares_below_median(logit_t: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of samples, and of classes, with a teacher's confidence at or below the median one.

    The authors' masks multiply losses that are means already, so that only the masks' own means have an effect: they
    are near one half.

    Args:
        logit_t: the teacher's logits, (B, classes).
    """
    p_t = F.softmax(logit_t, dim=1)
    confidences = p_t.amax(dim=1), p_t.sum(dim=0)
    return tuple((x <= x.median()).to(x.dtype).mean() for x in confidences)


class MLLD(nn.Module):
    """Distances of probabilities at five temperatures: of samples, between classes, between samples.

    Args:
        T: temperatures.
    """

    def __init__(self, T: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0, 6.0)):
        super().__init__()
        self.T = T

    def terms(
        self,
        logit_s: Tensor,
        logit_t: Tensor,
        logit_s_strong: Tensor | None = None,
        logit_t_strong: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The three terms by name; their sum is the loss. See ``forward``."""
        of_samples, of_classes = shares_below_median(logit_t)
        instance, classes, batch, strong = 0, 0, 0, 0
        for number, T in enumerate(self.T):
            log_s, log_t = (F.log_softmax(x / T, dim=1) for x in (logit_s, logit_t))
            p_s, p_t = log_s.exp(), log_t.exp()
            weak = _instance(log_s, log_t, T)
            instance, classes, batch = instance + weak, classes + class_loss(p_s, p_t), batch + batch_loss(p_s, p_t)
            if logit_s_strong is not None:
                logs = (F.log_softmax(x / T, dim=1) for x in (logit_s_strong, logit_t_strong))
                strong = strong + (_instance(*logs, T) if number < 3 else weak)
        return {"instance": of_samples * instance + strong, "class": of_classes * classes, "batch": of_samples * batch}

    def forward(
        self,
        logit_s: Tensor,
        logit_t: Tensor,
        logit_s_strong: Tensor | None = None,
        logit_t_strong: Tensor | None = None,
    ) -> list[Tensor]:
        """The three terms.

        Args:
            logit_s, logit_t: logits of the first view, (B, classes).
            logit_s_strong, logit_t_strong: logits of a strongly augmented view, if there is one. As in the authors'
                code only the first three temperatures compare them; the others compare the first view again.
        """
        return list(self.terms(logit_s, logit_t, logit_s_strong, logit_t_strong).values())
