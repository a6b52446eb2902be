"""VkD: Improving Knowledge Distillation using Orthogonal Projections (Miles et al., CVPR 2024, arXiv 2403.06213)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class _Orthogonal(nn.Module):
    """A matrix with orthonormal columns, or rows if it is wide: the first factor of a free matrix's QR decomposition.

    It does not depend on the free matrix's size, so that weight decay does nothing to it. The 'householder' map of
    PyTorch's ``orthogonal`` becomes zero under weight decay, and its backward pass goes column by column.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.shape[0] < x.shape[1]
        q, r = torch.linalg.qr(x.mT if wide else x)
        # An orthogonal matrix then is its own first factor.
        q = q * r.diagonal().sign()
        return q.mT if wide else q

    def right_inverse(self, q: Tensor) -> Tensor:
        """A matrix that gives an orthogonal one."""
        return q


class VkD(nn.Module):
    """Smooth L1 distance of orthogonally projected embeddings from layer-normalised ones.

    The projection keeps all angles, so that it cannot do the student's work. Its weight stays orthogonal under any
    optimiser.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's. The weight (t_dim, s_dim) has orthonormal columns, or rows for a wider student.
    """

    def __init__(self, s_dim: int, t_dim: int):
        super().__init__()
        self.projector = nn.Linear(s_dim, t_dim, bias=False)
        nn.init.orthogonal_(self.projector.weight)
        register_parametrization(self.projector, "weight", _Orthogonal())

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of embeddings (B, s_dim) against (B, t_dim), a scalar, the mean over all elements."""
        return F.smooth_l1_loss(self.projector(f_s), F.layer_norm(f_t, f_t.shape[1:]))
