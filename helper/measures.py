"""How well a network classifies, and how near a student is to its teacher: functions of logits and embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.EGA import ega_terms

from .util import predicted_class

# Guo et al. use so many.
_CALIBRATION_BINS = 15


def calibration_error(logits: Tensor, targets: Tensor, bins: int = _CALIBRATION_BINS) -> float:
    """Expected calibration error in percent (Guo et al., ICML 2017, equation 5), over bins of equal width.

    Samples are put together by their confidence, the highest probability; the error is the mean distance of a bin's
    confidence from its accuracy, each bin counting as many samples as it holds.

    Args:
        logits: (N, classes).
        targets: (N,) classes.
        bins: each is open below and closed above.
    """
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    excess = confidence - (predicted_class(logits) == targets).double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, number, excess)
    return 100 * float(sums.abs().sum()) / len(targets)


def confusion(predicted: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """(classes, classes) counts: row the true class, column the predicted one."""
    pairs = torch.bincount(targets * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def per_class_accuracy(matrix: Tensor) -> Tensor:
    """(classes,) percentages from ``confusion``'s counts; nan for a class without a sample."""
    return 100 * matrix.diagonal().double() / matrix.sum(dim=1)


def same_predictions(logit_s: Tensor, logit_t: Tensor) -> float:
    """Percentage of samples to which student and teacher give the same class."""
    return 100 * float((predicted_class(logit_s) == predicted_class(logit_t)).double().mean())


def divergence(logit_s: Tensor, logit_t: Tensor) -> float:
    """Mean KL(teacher || student) of the predicted distributions, at temperature 1, in nats."""
    log_s, log_t = (logits.double().log_softmax(dim=1) for logits in (logit_s, logit_t))
    return float(F.kl_div(log_s, log_t, reduction="batchmean", log_target=True))


def alignment_errors(f_s: Tensor, f_t: Tensor) -> tuple[float, float]:
    """EGA's node and edge matching loss of all N samples as one batch, each divided by N.

    What is left is the root mean square of the N x N entries: by how much a correlation differs from what it should be,
    whatever the size of the test set.

    Args:
        f_s, f_t: embeddings (N, D) in the joint space.
    """
    node, edge = ega_terms(f_s.double(), f_t.double())
    return float(node) / len(f_s), float(edge) / len(f_s)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features (N, D) and (N, D') of the same samples, 0 to 1.

    Kornblith et al., ICML 2019, equation 4: it does not change under rotation and isotropic scaling of either.
    """
    x, y = (f.double() - f.double().mean(dim=0) for f in (x, y))
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((y.T @ x).square().sum() / norms)


def by_name(classes: list[str], values: Tensor) -> dict[str, float | None]:
    """Values (classes,) by the classes' names; None for nan."""
    return {name: None if math.isnan(x) else x for name, x in zip(classes, values.tolist(), strict=True)}
