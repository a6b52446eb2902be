"""Relational Knowledge Distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A squared distance below this share of the two rows' squared norms is rounding: the rows are equal.
_EQUAL = 1e-12

# The least distance between two samples in the distance term, RepDistiller's.
_MIN_DISTANCE = 1e-6

# Angles per chunk of anchors.
_CHUNK = 2**22


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances (B, B) between the rows of a float64 (B, D); equal rows have 0, with zero gradient."""
    # The mean is taken off: distances do not depend on it, but their rounding does.
    x = x - x.mean(dim=0).detach()
    products = x @ x.T
    squares = products.diagonal()
    total = squares[:, None] + squares
    squared = total - 2 * products
    differ = squared > _EQUAL * total
    return torch.where(differ, torch.where(differ, squared, 1).sqrt(), 0)


def distance_loss(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Huber loss between two matrices (B, B) of distances, each divided by the mean over its pairs."""
    off_diagonal = 1 - torch.eye(len(d_s), dtype=d_s.dtype, device=d_s.device)
    pairs = max(len(d_s) * (len(d_s) - 1), 1)

    def relative(d: Tensor) -> Tensor:
        d = d.clamp(min=_MIN_DISTANCE) * off_diagonal
        return d / (d.sum() / pairs).clamp(min=_MIN_DISTANCE)

    return F.smooth_l1_loss(relative(d_s), relative(d_t))


class AngleLoss(torch.autograd.Function):
    """Mean Huber loss between the cosines of all B x B x B angles of two sets of samples.

    ``AngleLoss.apply(d_s, d_t)`` takes the samples' distances, (B, B). They determine the angles by the law of cosines,
    so that no vector of D features per pair is needed. Anchors come in chunks; a chunk leaves only its share of the
    value and of the gradient at d_s.
    """

    @staticmethod
    def forward(ctx, d_s: Tensor, d_t: Tensor) -> Tensor:
        inverse_s, inverse_t = (torch.where(d > 0, 1 / d, 0) for d in (d_s, d_t))
        squared_s, squared_t = d_s.square(), d_t.square()
        value, gradient = d_s.new_zeros(()), torch.zeros_like(d_s)
        for anchors in torch.arange(len(d_s), device=d_s.device).split(max(_CHUNK // d_s.numel(), 1)):
            cos = _cosines(squared_s, inverse_s, anchors)
            error = cos - _cosines(squared_t, inverse_t, anchors)
            slope = error.clamp(-1, 1)
            value += error.sub_(slope, alpha=0.5).mul_(slope).sum()
            # A triangle has three distances: the two at the anchor count by cos and by the product they divide ...
            gradient[anchors] -= 2 * inverse_s[anchors] * cos.mul_(slope).sum(dim=2)
            slope.mul_(inverse_s[anchors, :, None]).mul_(inverse_s[anchors, None, :])
            gradient[anchors] += 2 * d_s[anchors] * slope.sum(dim=2)
            # ... and the third is opposite to it.
            gradient -= d_s * slope.sum(dim=0)
        ctx.save_for_backward(gradient / len(d_s) ** 3)
        return value / len(d_s) ** 3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def _cosines(squared: Tensor, inverse: Tensor, anchors: Tensor) -> Tensor:
    """[a, j, k]: cosine of the angle at anchor a between samples j and k; 0 where one of them equals the anchor."""
    at_anchor = squared[anchors]
    cos = at_anchor[:, :, None] + at_anchor[:, None, :]
    return cos.sub_(squared).mul_(inverse[anchors, :, None]).mul_(inverse[anchors, None, :] / 2)


def rkd_loss(f_s: Tensor, f_t: Tensor, w_d: float = 25, w_a: float = 50) -> Tensor:
    """Differences between student and teacher in the distances of all pairs and the angles of all triples of samples.

    Distances are computed in float64: where samples have much in common, their differences would drown in rounding.

    Args:
        f_s: the student's embeddings, (B, ...).
        f_t: the teacher's embeddings, (B, ...), of any length. No gradient flows to them.
        w_d: weight of the distances.
        w_a: weight of the angles.

    Returns:
        Scalar; equal samples have no gradient from each other.

    Raises:
        ValueError: the tensors are not of one batch.
    """
    if min(f_s.dim(), f_t.dim()) < 2 or len(f_s) != len(f_t):
        raise ValueError(f"RKD needs embeddings (B, ...) of one batch, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    d_s, d_t = (pairwise_distances(f.flatten(1).double()).to(dtype) for f in (f_s, f_t.detach()))
    return w_d * distance_loss(d_s, d_t) + w_a * AngleLoss.apply(d_s, d_t)


class RKDLoss(nn.Module):
    """``rkd_loss`` with its weights."""

    def __init__(self, w_d: float = 25, w_a: float = 50):
        super().__init__()
        self.w_d = w_d
        self.w_a = w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return rkd_loss(f_s, f_t, self.w_d, self.w_a)
