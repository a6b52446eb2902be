"""How well a network classifies, and how near a student is to its teacher: functions of logits and embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.EGA import ega_terms, standardize

# As many as Guo et al. use.
_CALIBRATION_BINS = 15


def calibration_error(logits: Tensor, targets: Tensor, bins: int = _CALIBRATION_BINS) -> float:
    """Expected calibration error in percent (Guo et al., ICML 2017, equation 5), over bins of equal width.

    Samples are binned by their confidence, the highest probability. The error is the mean distance between a bin's
    confidence and its accuracy, weighted by the number of its samples.

    Args:
        logits: (N, classes).
        targets: (N,) classes.
        bins: their number; each bin is open below and closed above.
    """
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    excess = confidence - (logits.argmax(dim=1) == targets).double()
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
    return 100 * float((logit_s.argmax(dim=1) == logit_t.argmax(dim=1)).double().mean())


def divergence(logit_s: Tensor, logit_t: Tensor) -> float:
    """Mean KL(teacher || student) of the predicted distributions, at temperature 1, in nats."""
    log_s, log_t = (logits.double().log_softmax(dim=1) for logits in (logit_s, logit_t))
    return float(F.kl_div(log_s, log_t, reduction="batchmean", log_target=True))


def alignment_errors(f_s: Tensor, f_t: Tensor) -> tuple[float, float]:
    """EGA's node and edge matching loss of all N samples as one batch, each divided by N.

    The result is the root mean square of the N x N entries. It says by how much a correlation differs from what it
    should be, and does not grow with the test set.

    Args:
        f_s, f_t: embeddings (N, D) in the joint space.
    """
    node, edge = ega_terms(f_s.double(), f_t.double())
    return float(node) / len(f_s), float(edge) / len(f_s)


def embedding_graph(f_s: Tensor, f_t: Tensor, targets: Tensor, batch_size: int) -> dict[str, float | None]:
    """Mean correlations of a student with its teacher, in batches as in training: what EGA's terms are made of.

    Given the teacher twice, it gives the terms of a student that equals its teacher: 'node' is then how far the
    teacher's own graph is from the identity. A student that correlates with nothing has a node term of the square root
    of the batch size.

    Args:
        f_s, f_t: embeddings (N, D) in the joint space.
        targets: (N,) classes.
        batch_size: samples in a batch. Batches are drawn without replacement, the same ones every time; samples
            beyond the last whole batch are left out.

    Returns:
        'node' and 'edge': Frobenius norms, means over the batches. 'itself': the mean correlation of an image with its
        teacher's embedding of it. 'same_class': the mean with the teacher's embeddings of other images of its class in
        the batch, None where there are none. 'other_classes': the root mean square with those of other classes.
    """
    size = min(batch_size, len(f_s))
    order = torch.randperm(len(f_s), generator=torch.Generator().manual_seed(0))
    batches = order[: len(f_s) // size * size].view(-1, size)
    z_s, z_t, classes = standardize(f_s.double())[batches], standardize(f_t.double())[batches], targets[batches]
    node, identity = z_t @ z_s.mT, torch.eye(size, dtype=torch.float64)
    same = classes[:, :, None] == classes[:, None]
    near, far = node[same & (identity == 0)], node[~same]
    return {
        "node": float((node - identity).norm(dim=(1, 2)).mean()),
        "edge": float((z_t @ z_t.mT - z_s @ z_s.mT).norm(dim=(1, 2)).mean()),
        "itself": float(node.diagonal(dim1=1, dim2=2).mean()),
        "same_class": float(near.mean()) if len(near) else None,
        "other_classes": float(far.square().mean().sqrt()) if len(far) else None,
    }


def by_name(classes: list[str], values: Tensor) -> dict[str, float | None]:
    """Values (classes,) by the classes' names; None for nan."""
    return {name: None if math.isnan(x) else x for name, x in zip(classes, values.tolist(), strict=True)}
