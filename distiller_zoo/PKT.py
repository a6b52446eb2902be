"""Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis, Tefas, ECCV 2018)."""

import torch
from torch import Tensor, nn


def _neighbours(f: Tensor, eps: float) -> Tensor:
    """Probabilities, by cosine similarity, that sample j of the batch is a neighbour of sample i, in row i."""
    norm = torch.linalg.vector_norm(f, dim=1, keepdim=True)
    # A zero row would have a gradient divided by eps.
    f = f * torch.where(norm > 0, 1 / (norm + eps), 0)
    # Rounding can take the cosine of opposite rows below -1.
    similarity = (f @ f.T).add_(1).relu_()
    return similarity / similarity.sum(dim=1, keepdim=True)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """KL divergence between the teacher's and the student's probabilities of being neighbours.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's embeddings, (B, any). Gradients flow to both.
        eps: added to norms and probabilities.

    Returns:
        Scalar, the mean over the B x B pairs; a zero row has cosine 0 to all and zero gradient.

    Raises:
        ValueError: the tensors are not (B, D) of one batch.
    """
    if f_s.dim() != 2 or f_t.dim() != 2 or len(f_s) != len(f_t):
        raise ValueError(f"PKT needs (B, D) embeddings of one batch, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
        p_s, p_t = _neighbours(f_s.to(dtype), eps), _neighbours(f_t.to(dtype), eps)
        return (p_t * torch.log((p_t + eps) / (p_s + eps))).mean()


class PKT(nn.Module):
    """``pkt_loss`` as a module."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return pkt_loss(f_s, f_t)
