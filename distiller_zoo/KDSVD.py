"""Self-supervised knowledge distillation using singular value decomposition (Lee, Kim, Song, ECCV 2018,
arXiv 1807.06819)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _inverse(x: Tensor, rounding: Tensor) -> Tensor:
    """1 / x, and zero where x is zero but for rounding."""
    return torch.where(x.abs() > rounding, 1 / x, 0)


def _decompose(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of (B, C, N), on the side of C, from the smaller Gram matrix: cheaper.

    Returns:
        Squared singular values (B, r), falling, r = min(C, N); their error by rounding (B, 1); singular vectors
        (B, C, r), zero where the singular value is zero but for rounding.
    """
    tall = maps.shape[1] > maps.shape[2]
    values, vectors = torch.linalg.eigh(maps.mT @ maps if tall else maps @ maps.mT)
    values, vectors = values.flip(-1), vectors.flip(-1)
    if tall:
        vectors = F.normalize(maps @ vectors, dim=1)
    rounding = values.shape[1] * torch.finfo(maps.dtype).eps * values[:, :1]
    return values, rounding, vectors * (values > rounding)[:, None]


def _student_vectors(maps: Tensor, v_t: Tensor) -> Tensor:
    """Find the student's closest vector to each of the teacher's k vectors (B, C, k), turned to its side.

    The candidates are the first k + 3 singular vectors of ``maps`` (B, C, N).
    """
    with torch.no_grad():
        values, rounding, vectors = _decompose(maps)
        cosines = vectors[:, :, : v_t.shape[2] + 3].mT @ v_t
        best = cosines.abs().argmax(dim=1, keepdim=True)
        v = vectors.gather(2, best.expand(-1, vectors.shape[1], -1)) * cosines.gather(1, best).sign()
        value = values.gather(1, best[:, 0])
        within = _inverse(value[:, None] - values[:, :, None], rounding[:, None])
        beyond = _inverse(value, rounding)[:, None]
    # This is the derivative of an eigenvector v of the Gram matrix G as written by hand: the part of dG v along each
    # other vector is divided by the distance of the two eigenvalues, and the rest by the eigenvalue itself. Autograd's
    # derivative fails at repeated singular values; this one leaves out the directions in which v is not determined.
    product = maps @ (v.mT @ maps).mT
    change = product - product.detach()
    return v + beyond * change + vectors @ ((within - beyond) * (vectors.mT @ change))


def singular_vectors(f_s: Tensor, f_t: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The teacher's k main directions in the space of channels, and the student's that match them.

    A sample's maps are a matrix of pixels by channels. The teacher's directions are its first k right singular
    vectors. The student's match for each is the one of its own first k + 3 with the largest absolute cosine, with the
    sign that makes the cosine positive. Both are scaled by the teacher's k singular values, which are scaled to unit
    norm. Maps of zeros give directions of zeros.

    Args:
        f_s: the student's maps, (B, C, H, W). A direction that its maps do not determine, since the singular value
            is repeated or zero, gets no gradient.
        f_t: the teacher's, (B, C, H', W'). No gradient flows to them.
        k: number of directions.

    Returns:
        Student's and teacher's directions, (B, C, k) each.

    Raises:
        ValueError: for tensors that are not maps of one number of samples and channels.
    """
    if f_s.dim() != 4 or f_t.dim() != 4 or f_s.shape[:2] != f_t.shape[:2]:
        raise ValueError(
            f"KDSVD needs two (B, C, H, W) tensors of one B and C, got {tuple(f_s.shape)} and {tuple(f_t.shape)}"
        )
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
        with torch.no_grad():
            # The loss depends on the signs of the teacher's vectors, and these on how they are computed. A Gram matrix,
            # as for the student's, or the transposed maps would not give RepDistiller's loss.
            _, scale, rows = torch.linalg.svd(f_t.to(dtype).flatten(2).mT, full_matrices=False)
            scale, v_t = F.normalize(scale[:, :k])[:, None], rows[:, :k].mT
        v_s = _student_vectors(f_s.to(dtype).flatten(2), v_t)
        return v_s * scale, v_t * scale


def kdsvd_loss(bottom_s: Tensor, top_s: Tensor, bottom_t: Tensor, top_t: Tensor) -> Tensor:
    """Squared difference of the radial basis functions between two layers' directions, student against teacher.

    The function of layers with directions a and b is ``exp(-(a_i - b_j)² / 8)`` for channels i and j (Lee et al.,
    section 3.3, in RepDistiller's form).

    Args:
        bottom_s: the student's directions in the lower layer, (B, C, k), of ``singular_vectors``.
        top_s: in the upper layer, (B, C', k).
        bottom_t: the teacher's in the lower layer, (B, C, k).
        top_t: in the upper layer, (B, C', k).

    Returns:
        Scalar, the sum over channels and directions, and the mean over samples.
    """
    rbf_s, rbf_t = (
        torch.exp((top[:, :, None] - bottom[:, None]).square() / -8)
        for bottom, top in ((bottom_s, top_s), (bottom_t, top_t))
    )
    return F.mse_loss(rbf_s, rbf_t, reduction="sum") / len(rbf_s)


class KDSVD(nn.Module):
    """``kdsvd_loss`` for each two layers in a row.

    Args:
        k: number of directions, of ``singular_vectors``.
    """

    def __init__(self, k: int = 1):
        super().__init__()
        self.k = k

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        """One loss fewer than layers; as in RepDistiller, the longer list's last layers are left out."""
        layers = [singular_vectors(f_s, f_t, self.k) for f_s, f_t in zip(g_s, g_t, strict=False)]
        return [
            kdsvd_loss(bottom_s, top_s, bottom_t, top_t) for (bottom_s, bottom_t), (top_s, top_t) in pairwise(layers)
        ]
