"""Knowledge transfer via distillation of activation boundaries formed by hidden neurons (Heo, Lee, Yun, Choi,
AAAI 2019, arXiv 1811.03233)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def ab_loss(f_s: Tensor, f_t: Tensor, margin: float = 1.0) -> Tensor:
    """Squared distance of the student's pre-activations from the teacher's side of the boundary (Heo et al., eq. 6).

    Where the teacher's neuron is active, above 0, the student's should be above ``margin``; elsewhere it should be
    below ``-margin``. Values beyond the margin have no loss.

    Args:
        f_s: the student's values before the ReLU, of any shape (B, ...).
        f_t: the teacher's values, of the same shape. Only their signs count: no gradient flows to them.
        margin: distance from the boundary that is far enough.

    Returns:
        Scalar, the sum over neurons and the mean over samples.

    Raises:
        ValueError: the shapes differ.
    """
    if f_s.shape != f_t.shape:
        raise ValueError(
            f"activation boundaries need two tensors of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}"
        )
    f_s = f_s.to(torch.promote_types(f_s.dtype, torch.float32))
    with torch.no_grad():
        # The goal is the nearest value without loss: as a constant, it leaves one difference to differentiate.
        goal = torch.where(f_t > 0, f_s.clamp_min(margin), f_s.clamp_max(-margin))
    return F.mse_loss(f_s, goal, reduction="sum") / len(f_s)


class ABLoss(nn.Module):
    """``ab_loss`` of each pair of layers, scaled as in RepDistiller.

    The last layer's factor is 0.003; every other layer has half the factor of the next.

    Args:
        feat_num: number of layers.
        margin: see ``ab_loss``.
    """

    def __init__(self, feat_num: int, margin: float = 1.0):
        super().__init__()
        self.w = [2.0 ** (i - feat_num + 1) for i in range(feat_num)]
        self.margin = margin

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        """One loss per layer.

        Raises:
            ValueError: the number of layers is not ``feat_num``.
        """
        if not len(g_s) == len(g_t) == len(self.w):
            raise ValueError(f"ABLoss was built for {len(self.w)} layers, got {len(g_s)} and {len(g_t)}")
        return [0.003 * w * ab_loss(f_s, f_t, self.margin) for w, f_s, f_t in zip(self.w, g_s, g_t, strict=True)]
