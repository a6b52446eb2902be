"""Distilling Knowledge from Self-Supervised Teacher by Embedding Graph Alignment (Ma, Chen, Akata, BMVC 2022)."""

import torch
from torch import Tensor, nn

# A row whose centred norm is at most this share of its norm counts as constant.
_CONSTANT = 1e-6


def standardize(x: Tensor) -> Tensor:
    """Centre each row of (B, D) and scale it to unit norm, so that products of rows are Pearson correlations.

    A constant row becomes zero, with zero gradient.
    """
    centred = x - x.mean(dim=1, keepdim=True)
    with torch.no_grad():
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        varies = torch.linalg.vector_norm(centred, dim=1, keepdim=True) > _CONSTANT * norm
    # The norm of a constant row is never taken: its gradient would be 0 / 0.
    centred = torch.where(varies, centred, 0)
    norm = torch.linalg.vector_norm(torch.where(varies, centred, 1), dim=1, keepdim=True)
    return centred / norm


def ega_terms(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """The node and the edge matching loss of one batch (EGA, equations 4 to 6), not weighted.

    Nodes are embeddings, an edge is the Pearson correlation of two embeddings across their D features.
    ``L_node = ||N_ts - I||_F`` correlates teacher sample i with student sample j, and
    ``L_edge = ||E_t - E_s||_F`` compares the edges among the teacher's with those among the student's.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's, (B, D). Gradients flow to both.

    Returns:
        (L_node, L_edge), scalars; a term that is zero has zero gradient.

    Raises:
        ValueError: for two tensors that are not of one shape (B, D).
    """
    if f_s.dim() != 2 or f_s.shape != f_t.shape:
        raise ValueError(f"EGA needs two (B, D) tensors of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
        z_s, z_t = standardize(f_s.to(dtype)), standardize(f_t.to(dtype))
        node = torch.linalg.vector_norm(z_t @ z_s.T - torch.eye(len(z_s), dtype=dtype, device=z_s.device))
        edge = torch.linalg.vector_norm(z_t @ z_t.T - z_s @ z_s.T)
    return node, edge


class EGA(nn.Module):
    """Embedding graph alignment: ``node_weight * L_node + edge_weight * L_edge`` (EGA, equation 7).

    Args:
        node_weight: weight of the node matching loss.
        edge_weight: weight of the edge matching loss.
    """

    def __init__(self, node_weight: float = 0.8, edge_weight: float = 0.24):
        super().__init__()
        self.node_weight = node_weight
        self.edge_weight = edge_weight

    def terms(self, f_s: Tensor, f_t: Tensor) -> dict[str, Tensor]:
        """The two weighted terms by name; their sum is the loss."""
        node, edge = ega_terms(f_s, f_t)
        return {"node": self.node_weight * node, "edge": self.edge_weight * edge}

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of student embeddings (B, D) against teacher embeddings (B, D), a scalar."""
        return sum(self.terms(f_s, f_t).values())
