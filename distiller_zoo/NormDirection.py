"""KD++: Distillation via Regularizing Feature Norm and Direction (Wang et al., 2023, arXiv 2305.17007)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormDirection(nn.Module):
    """How far the student's embeddings are from long ones along the teacher's mean embedding of their class.

    Args:
        centres: the teacher's mean embedding of each class, (classes, D); ``acquaint`` replaces them.
    """

    def __init__(self, centres: Tensor):
        super().__init__()
        self.register_buffer("centres", centres)

    def acquaint(self, f_t: Tensor, target: Tensor, names: Callable[[], Tensor | None]) -> None:
        """Average the teacher's embeddings (N, D) of each class; ``target`` (N,) is -1 where it is not known."""
        f_t, target = f_t[target >= 0], target[target >= 0]
        counts = torch.bincount(target, minlength=len(self.centres)).clamp_min(1)
        self.centres = torch.zeros_like(self.centres).index_add(0, target, f_t) / counts[:, None]

    def forward(self, f_s: Tensor, f_t: Tensor, target: Tensor) -> Tensor:
        """The loss of embeddings (B, D) against (B, D) with targets (B,), a scalar, the mean over the batch.

        The gradient goes through the larger of the two norms.
        """
        along = (f_s * F.normalize(self.centres[target], dim=1)).sum(dim=1)
        length = torch.maximum(*(torch.linalg.vector_norm(f, dim=1) for f in (f_s, f_t)))
        return (1 - along / length.clamp_min(1e-12)).mean()
