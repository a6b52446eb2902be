"""Relational Representation Distillation (Giakoumoglou, Stathaki, 2024, arXiv 2407.12073), and KL over a queue.

SEED (Fang et al., ICLR 2021, arXiv 2101.04731) and LightlyTrain compare in the same way, without layers of their own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def queue_kl(f_s: Tensor, f_t: Tensor, queue: Tensor, T: float = 0.07) -> Tensor:
    """KL divergence of the samples' similarities to a queue of the teacher's embeddings.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's, (B, D).
        queue: rows of unit norm, (K, D).
        T: temperature of both sides.

    Returns:
        Scalar, the mean over the batch.
    """
    log_s, log_t = (F.log_softmax(F.normalize(f, dim=1) @ queue.T / T, dim=1) for f in (f_s, f_t))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class RRD(nn.Module):
    """Cross-entropy of the samples' similarities to a queue of the teacher's embeddings, linearly projected.

    As in the authors' code the teacher's layer never learns: it is a random projection. A batch enters the queue before
    it is compared. The temperatures are the command line's that made the published numbers; the paper has the
    student's as the smaller one. The queue begins with random rows of unit norm.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's.
        feat_dim: width of the projections.
        queue_size: number of rows; None for one row of every training image, which ``acquaint`` computes and which
            stay as they are.
        T_s, T_t: temperatures of the student's and of the teacher's similarities.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        feat_dim: int = 128,
        queue_size: int | None = 16384,
        T_s: float = 0.1,
        T_t: float = 0.02,
    ):
        super().__init__()
        self.embed_s = nn.Linear(s_dim, feat_dim)
        self.embed_t = nn.Linear(t_dim, feat_dim).requires_grad_(False)
        self.keeps = queue_size is None
        self.T_s = T_s
        self.T_t = T_t
        rows = F.normalize(torch.randn(queue_size or 1, feat_dim), dim=1)
        self.register_buffer("queue", rows, persistent=not self.keeps)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def acquaint(self, f_t: Tensor, target: Tensor, names: Callable[[], Tensor | None]) -> None:
        """Let the queue be the teacher's embeddings (N, t_dim) of the training images, if it has no rows of its own."""
        if self.keeps:
            self.queue = F.normalize(self.embed_t(f_t), dim=1)

    @torch.no_grad()
    def _enter(self, rows: Tensor) -> None:
        """Replace the oldest rows of the queue."""
        rows = rows[-len(self.queue) :]
        number = torch.arange(len(rows), device=rows.device)
        self.queue[(self.place + number) % len(self.queue)] = rows.to(self.queue.dtype)
        self.place.copy_((self.place + len(rows)) % len(self.queue))

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of embeddings (B, s_dim) against (B, t_dim), a scalar, the mean over the batch."""
        with torch.no_grad():
            z_t = F.normalize(self.embed_t(f_t), dim=1)
        if not self.keeps:
            self._enter(z_t)
        # The queue changes before the backward pass where a step has several forward passes.
        queue = self.queue if self.keeps else self.queue.clone()
        p_t = F.softmax((z_t / self.T_t) @ queue.T, dim=1)
        log_s = F.log_softmax((F.normalize(self.embed_s(f_s), dim=1) / self.T_s) @ queue.T, dim=1)
        return -(p_t * log_s).sum() / len(f_s)
