"""VkD: Improving Knowledge Distillation using Orthogonal Projections (Miles et al., CVPR 2024, arXiv 2403.06213)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class _Reflections(nn.Module):
    """A matrix with orthonormal columns, or rows if it is wide, as a product of Householder reflections.

    PyTorch's ``orthogonal`` with its 'householder' map is the same but for the signs: it keeps them in the learned
    tensor, from which a weight decay takes them, and the matrix becomes zero.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.wide = weight.shape[0] < weight.shape[1]
        self.register_buffer("sign", torch.ones(min(weight.shape)))

    def forward(self, x: Tensor) -> Tensor:
        below = (x.mT if self.wide else x).tril(-1)
        q = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(dim=0))) * self.sign.to(x.dtype)
        return q.mT if self.wide else q

    @torch.no_grad()
    def right_inverse(self, q: Tensor) -> Tensor:
        """The tensor that gives a matrix."""
        factors, tau = torch.geqrf(q.mT if self.wide else q)
        sign = factors.diagonal().sign()
        self.sign = torch.where(tau == 0, -sign, sign)
        return factors.mT.contiguous() if self.wide else factors


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
        register_parametrization(self.projector, "weight", _Reflections(self.projector.weight))

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of embeddings (B, s_dim) against (B, t_dim), a scalar, the mean over all elements."""
        return F.smooth_l1_loss(self.projector(f_s), F.layer_norm(f_t, f_t.shape[1:]))
