"""Regression to a frozen encoder's standardised embeddings: UNIC and PHI-S.

UNIC: Universal Classification Models via Multi-Teacher Distillation (Sariyildiz et al., ECCV 2024, arXiv 2408.05088);
PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation (Ranzinger et al., 2024, arXiv 2410.01680).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineSmoothL1(nn.Module):
    """UNIC's loss: a cosine distance and a smooth L1 distance.

    Args:
        cos: weight of 1 - cosine, the mean over samples.
        l1: weight of the smooth L1 distance, the mean over all elements.
    """

    def __init__(self, cos: float = 0.5, l1: float = 0.5):
        super().__init__()
        self.cos = cos
        self.l1 = l1

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Embeddings (B, D) of both, a scalar."""
        cosine = F.cosine_similarity(f_s, f_t, dim=1)
        return self.cos * (1 - cosine).mean() + self.l1 * F.smooth_l1_loss(f_s, f_t)


class Standardize(nn.Module):
    """Standardise each dimension by running statistics.

    Args:
        dim: width of the embeddings.
        eps: added to the standard deviation, as in the authors' code when it is measured and when it divides.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(1, dim))
        self.register_buffer("std", torch.ones(1, dim))

    def forward(self, x: Tensor, momentum: float = 0.0) -> Tensor:
        """Embeddings (B, dim), standardised by the statistics as they were before they move.

        Args:
            momentum: share of this batch in the statistics afterwards.
        """
        standardized = (x - self.mean) / (self.std + self.eps)
        if momentum:
            with torch.no_grad():
                self.mean.lerp_(x.mean(dim=0, keepdim=True), momentum)
                self.std.lerp_(x.std(dim=0, keepdim=True) + self.eps, momentum)
        return standardized

    def acquaint(self, f_t: Tensor) -> None:
        """Measure the statistics on all the teacher's embeddings (N, dim)."""
        self(f_t, momentum=1.0)


def _is_prime(q: int) -> bool:
    return q > 2 and all(q % i for i in range(2, int(q**0.5) + 1))


def _paley(n: int) -> Tensor | None:
    """A Hadamard matrix of n rows by one of Paley's constructions; None where neither has one."""
    double = n % 8 == 4 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1
    q = n // 2 - 1 if double else n - 1
    if not double and not (n % 4 == 0 and _is_prime(q)):
        return None
    square = torch.zeros(q)
    square[torch.arange(1, q) ** 2 % q] = 2
    row = (square - 1).index_fill(0, torch.tensor([0]), 0)
    difference = (torch.arange(q)[:, None] - torch.arange(q)) % q
    core = F.pad(row[difference], (1, 0, 1, 0), value=1.0)
    core[0, 0] = 0
    if not double:
        core[1:, 0] = -1
        return core + torch.eye(n)
    one, two = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(core, one) + torch.kron(torch.eye(q + 1), two)


def _spreading_matrix(n: int) -> Tensor:
    """An orthogonal matrix (n, n) in float64 that spreads every axis over all dimensions.

    It is a Hadamard matrix where Sylvester's or Paley's constructions have one, and otherwise a fixed random rotation.
    """
    odd, doublings = n, 0
    while True:
        found = torch.ones(1, 1) if odd == 1 else _paley(odd)
        if found is not None:
            for _ in range(doublings):
                found = torch.kron(torch.tensor([[1.0, 1], [1, -1]]), found)
            return found.double() / n**0.5
        if odd % 2:
            generator = torch.Generator().manual_seed(0)
            return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
        odd, doublings = odd // 2, doublings + 1


def phi_standardizer(features: Tensor) -> tuple[Tensor, Tensor]:
    """A rotation and one scale after which every dimension has variance 1 (PHI-S).

    The principal axes are spread evenly over all dimensions by a Hadamard matrix. Distances keep their proportions, and
    the map can be undone.

    Args:
        features: a sample of the teacher's embeddings, (N, D).

    Returns:
        (mean (D,), matrix (D, D)); (x - mean) @ matrix.T is standardised.
    """
    x = features.double()
    mean = x.mean(dim=0)
    x = x - mean
    values, vectors = torch.linalg.eigh(x.T @ x / max(len(x) - 1, 1))
    spread = _spreading_matrix(x.shape[1]).to(x.device)
    scale = values.mean().clamp_min(1e-12).rsqrt()
    return mean.to(features.dtype), (scale * spread @ vectors.T).to(features.dtype)


class PhiStandardize(nn.Module):
    """``phi_standardizer`` of all the teacher's embeddings.

    Args:
        dim: width of the embeddings.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, dim), standardised."""
        return (x - self.mean) @ self.matrix.T

    def acquaint(self, f_t: Tensor) -> None:
        """Compute the map from all the teacher's embeddings (N, dim)."""
        self.mean, self.matrix = phi_standardizer(f_t)


class UNIC(nn.Module):
    """``CosineSmoothL1`` of linearly projected embeddings against the teacher's standardised ones.

    The authors' code keeps running statistics, and does not standardise in its first step. Here ``acquaint`` measures
    them once.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's.
        phi: standardise by ``PhiStandardize``, not dimension by dimension.
        project: False where the student's embeddings are in the teacher's space already: both are standardised.
    """

    def __init__(self, s_dim: int, t_dim: int, phi: bool = False, project: bool = True):
        super().__init__()
        self.embed = nn.Linear(s_dim, t_dim) if project else None
        self.standardize = PhiStandardize(t_dim) if phi else Standardize(t_dim)
        self.loss = CosineSmoothL1()

    def acquaint(self, f_t: Tensor, target: Tensor, names: Callable[[], Tensor | None]) -> None:
        """Measure the statistics of the teacher's embeddings (N, t_dim) of the training images."""
        self.standardize.acquaint(f_t)

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of embeddings (B, s_dim) against (B, t_dim), a scalar."""
        z_s = self.standardize(f_s) if self.embed is None else self.embed(f_s)
        return self.loss(z_s, self.standardize(f_t))
