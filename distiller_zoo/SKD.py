"""Streamlined Knowledge Distillation (Jeong et al., CVPR 2026)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def skd_direction(logit_s: Tensor, logit_t: Tensor, tikhonov: float = 0.1) -> Tensor:
    """Mahalanobis length of the difference between the samples' cosines, by its own covariance.

    As in the authors' code the cosines are divided by the number of classes.

    Args:
        logit_s: the student's logits, (B, classes).
        logit_t: the teacher's, (B, classes).
        tikhonov: added to the covariance's diagonal.

    Returns:
        Scalar, the mean over the batch.
    """
    n_s, n_t = F.normalize(logit_s, dim=1), F.normalize(logit_t, dim=1)
    difference = (n_s @ n_s.T - n_t @ n_t.T) / logit_s.shape[1]
    centred = difference - difference.mean(dim=0)
    covariance = centred.T @ centred / max(len(centred) - 1, 1)
    # This factorisation and this solution do not wait for a GPU.
    diagonal = torch.eye(len(centred), device=covariance.device, dtype=covariance.dtype)
    factor, _ = torch.linalg.cholesky_ex(covariance + tikhonov * diagonal)
    whitened = torch.linalg.solve_triangular(factor, difference.T, upper=False)
    square = whitened.square().sum(dim=0)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt().mean()


class SKD(nn.Module):
    """KL divergence of softened class distributions, and ``skd_direction``.

    As in the authors' code each is multiplied by the share of samples, or classes, with a teacher's confidence at or
    below the median: a number near one half.

    Args:
        T: temperature of the first term.
        tikhonov: see ``skd_direction``.
    """

    def __init__(self, T: float = 4.0, tikhonov: float = 0.1):
        super().__init__()
        self.T = T
        self.tikhonov = tikhonov

    def terms(self, logit_s: Tensor, logit_t: Tensor) -> dict[str, Tensor]:
        """The terms by name; their sum is the loss."""
        p_t = F.softmax(logit_t, dim=1)
        of_samples, of_classes = ((x <= x.median()).to(x.dtype).mean() for x in (p_t.amax(dim=1), p_t.sum(dim=0)))
        log_s, log_t = (F.log_softmax(x / self.T, dim=1) for x in (logit_s, logit_t))
        instance = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * self.T**2
        direction = skd_direction(logit_s, logit_t, self.tikhonov)
        return {"instance": of_samples * instance, "direction": of_classes * direction}

    def forward(self, logit_s: Tensor, logit_t: Tensor) -> list[Tensor]:
        """The terms of logits (B, classes)."""
        return list(self.terms(logit_s, logit_t).values())
