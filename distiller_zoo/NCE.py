"""Supervised contrast of student and teacher embeddings, the NCE baseline of EGA (Ma et al., BMVC 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keeps the logarithm of a probability finite, as in EGA's release.
_EPS = 1e-10


def _unit(f: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero, with zero gradient."""
    return F.normalize(torch.where(f.any(dim=1, keepdim=True), f, 0), dim=1)


def nce_loss(f_s: Tensor, f_t: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast: a student's embedding has to find the teacher's embeddings of its class among all.

    Each student sample has probabilities p over the teacher's samples: a softmax of cosine similarities divided by the
    temperature. Its loss is the mean of -log p over the teacher's samples of its class, itself included, plus the mean
    of -log(1 - p) over the others.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's embeddings, (B, D). Gradients flow to both.
        target: classes, (B,).
        temperature: the softmax's temperature.

    Returns:
        Scalar, the mean over the batch; if all samples have the same class, the second mean counts as zero.

    Raises:
        ValueError: the embeddings do not share a shape (B, D), or the targets are of another batch.
    """
    if f_s.dim() != 2 or f_s.shape != f_t.shape or target.shape != f_s.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (f_s, f_t, target))
        raise ValueError(f"NCE needs embeddings (B, D), (B, D) and targets (B,), got {shapes}")
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
        p = F.softmax(_unit(f_s.to(dtype)) @ _unit(f_t.to(dtype)).T / temperature, dim=1)
        same = target[:, None] == target
        attract = torch.where(same, -torch.log(p + _EPS), 0).sum(dim=1) / same.sum(dim=1)
        repel = torch.where(same, 0, -torch.log(1 - p + _EPS)).sum(dim=1) / (~same).sum(dim=1).clamp(min=1)
        return (attract + repel).mean()


class NCELoss(nn.Module):
    """``nce_loss`` at a temperature."""

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, f_s: Tensor, f_t: Tensor, target: Tensor) -> Tensor:
        return nce_loss(f_s, f_t, target, self.temperature)
