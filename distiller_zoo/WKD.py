"""Wasserstein distance rivals KL divergence for distillation: WKD (Lv et al., NeurIPS 2024, arXiv 2412.08139)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Samples of each class that its cost to other classes is computed from: their Gram matrices are held at once.
_SAMPLES = 512


def wkd_cost(class_features: Tensor, sharpen: float = 1.0) -> Tensor:
    """The cost to move probability from one class to another: small where their features are alike (WKD, section 3.1).

    Two classes are compared by linear CKA, which pairs their samples by order. Its products of features follow from the
    samples' Gram matrices.

    Args:
        class_features: features of as many samples of every class, (classes, samples, D).
        sharpen: factor of the dissimilarity.

    Returns:
        (classes, classes), from 0 for equal features to 1.
    """
    x = class_features - class_features.mean(dim=1, keepdim=True)
    gram = F.normalize((x @ x.mT).flatten(1), dim=1)
    return 1 - torch.exp(-sharpen * (1 - gram @ gram.T))


def _of_each_class(f_t: Tensor, target: Tensor, classes: int) -> Tensor:
    """As many first samples of each class as its smallest one has, (classes, samples, D)."""
    counts = torch.bincount(target[target >= 0], minlength=classes)
    samples = min(int(counts.min()), _SAMPLES)
    return torch.stack([f_t[target == number][:samples] for number in range(classes)])


def wkd_terms(
    logit_s: Tensor,
    logit_t: Tensor,
    target: Tensor,
    cost: Tensor,
    T: float = 8.0,
    reg: float = 0.05,
    iterations: int = 10,
) -> tuple[Tensor, Tensor]:
    """The two parts of the loss on logits: of the target class, and the transport between the other classes.

    The transport is regularised by entropy (Sinkhorn's iterations), and gradients go through them. The target has no
    probability in it, so that all samples share one matrix of costs.

    Args:
        logit_s: the student's logits, (B, C).
        logit_t: the teacher's logits, (B, C).
        target: class indices, (B,).
        cost: cost between classes, (C, C).
        T: temperature of the transported probabilities.
        reg: weight of the entropy.
        iterations: Sinkhorn's.

    Returns:
        Two scalars, means over the batch, in float32 or better.
    """
    dtype = torch.promote_types(logit_s.dtype, torch.float32)
    logit_s, logit_t, target = logit_s.to(dtype), logit_t.to(dtype), target[:, None]
    log_s, p_t = F.log_softmax(logit_s, dim=1).gather(1, target), F.softmax(logit_t, dim=1).gather(1, target)
    lowest = torch.finfo(dtype).min / 2
    a, b = (F.softmax((x / T).scatter(1, target, lowest), dim=1) for x in (logit_s, logit_t))
    cost = cost.to(dtype).clamp_min(0) + 1e-8
    kernel = torch.exp(-cost / reg)
    u = torch.full_like(a, 1 / max(a.shape[1] - 1, 1)).scatter(1, target, 0)
    for _ in range(iterations):
        v = b / (u @ kernel + 1e-8)
        u = a / (v @ kernel.T + 1e-8)
    return -(p_t * log_s).mean(), (u @ (kernel * cost) * v).sum() / len(u)


class WKDLogit(nn.Module):
    """The two parts of ``wkd_terms``, the second one weighted.

    Args:
        cost: cost between classes, (C, C); ``acquaint`` replaces it.
        T, reg, iterations: see ``wkd_terms``.
        gamma: weight of the transport.
        by_names: take the cost from the classes' names, not from their images.
    """

    def __init__(
        self,
        cost: Tensor,
        T: float = 8.0,
        gamma: float = 600.0,
        reg: float = 0.05,
        iterations: int = 10,
        by_names: bool = False,
    ):
        super().__init__()
        self.register_buffer("cost", cost)
        self.T = T
        self.gamma = gamma
        self.reg = reg
        self.iterations = iterations
        self.by_names = by_names

    def acquaint(self, f_t: Tensor, target: Tensor, names: Callable[[], Tensor | None]) -> None:
        """Compute the cost from the teacher's embeddings of the training images, or of captions of the classes.

        Args:
            f_t: (N, D).
            target: (N,) class indices, -1 where the class is not known.
            names: gives embeddings of each class's captions, (C, captions, D).
        """
        features = names() if self.by_names else _of_each_class(f_t, target, len(self.cost))
        self.cost = wkd_cost(features)

    def terms(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The weighted parts by name; their sum is the loss."""
        of_target, transport = wkd_terms(logit_s, logit_t, target, self.cost, self.T, self.reg, self.iterations)
        return {"target": of_target, "transport": self.gamma * transport}

    def forward(self, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (B, C) with targets (B,), a scalar."""
        return sum(self.terms(logit_s, logit_t, target).values())


def _moments(x: Tensor, grid: int, eps: float) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of each channel in each cell of maps (B, C, H, W), (cells, B, C)."""
    cells = [x]
    if grid > 1:
        cells = [cell for rows in x.tensor_split(grid, dim=2) for cell in rows.tensor_split(grid, dim=3)]
    mean = torch.stack([cell.mean(dim=(2, 3)) for cell in cells])
    # A single pixel varies by nothing.
    var = [cell.var(dim=(2, 3), correction=min(cell[0, 0].numel() - 1, 1)) for cell in cells]
    return mean, (torch.stack(var) + eps).sqrt()


def wkd_feature_loss(map_s: Tensor, map_t: Tensor, ratio: float = 4.0, grid: int = 1, eps: float = 1e-5) -> Tensor:
    """Squared Wasserstein distance between Gaussians of independent channels (WKD, section 3.2).

    Args:
        map_s: the student's maps, (B, C, H, W).
        map_t: the teacher's, (B, C, H', W').
        ratio: weight of the means against the standard deviations.
        grid: rows and columns of cells; each cell has its own Gaussian.
        eps: added to the variances.

    Returns:
        Scalar, the mean over the batch and the cells.
    """
    dtype = torch.promote_types(map_s.dtype, torch.float32)
    (mean_s, std_s), (mean_t, std_t) = (_moments(x.to(dtype), grid, eps) for x in (map_s, map_t))
    distance = ratio * (mean_s - mean_t).square().sum() + (std_s - std_t).square().sum()
    return distance / (len(map_s) * grid**2)


class WKDFeature(nn.Module):
    """``wkd_feature_loss`` with its constants."""

    def __init__(self, ratio: float = 4.0, grid: int = 1, eps: float = 1e-5):
        super().__init__()
        self.ratio = ratio
        self.grid = grid
        self.eps = eps

    def forward(self, map_s: Tensor, map_t: Tensor) -> Tensor:
        return wkd_feature_loss(map_s, map_t, self.ratio, self.grid, self.eps)
