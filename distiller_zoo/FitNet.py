"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015, arXiv 1412.6550)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hint_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared error between the student's regressed hint and the teacher's (FitNets, equation 3).

    Args:
        f_s: the student's features, of any shape.
        f_t: the teacher's features, of the same shape.

    Returns:
        Scalar, the mean over all elements.

    Raises:
        ValueError: the shapes differ.
    """
    if f_s.shape != f_t.shape:
        raise ValueError(f"hints need two tensors of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    return F.mse_loss(f_s.to(dtype), f_t.to(dtype))


class HintLoss(nn.Module):
    """``hint_loss`` as a module."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return hint_loss(f_s, f_t)
