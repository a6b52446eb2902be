"""Improved Feature Distillation via Projector Ensemble (Chen et al., NeurIPS 2022, arXiv 2210.15274)."""

import torch.nn.functional as F
from torch import Tensor, nn


class PEFD(nn.Module):
    """Cosine distance of the mean of several projections.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's.
        projectors: number of linear layers.
        relu: let a ReLU follow each, as a CNN's features have no negative entries; a frozen encoder's have.
    """

    def __init__(self, s_dim: int, t_dim: int, projectors: int = 3, relu: bool = True):
        super().__init__()
        self.projectors = nn.ModuleList(nn.Linear(s_dim, t_dim) for _ in range(projectors))
        self.relu = relu

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of embeddings (B, s_dim) against (B, t_dim), a scalar, the mean over the batch."""
        projected = [projector(f_s) for projector in self.projectors]
        mean = sum(F.relu(x) if self.relu else x for x in projected) / len(projected)
        return (1 - F.cosine_similarity(mean, f_t, dim=1)).mean()
