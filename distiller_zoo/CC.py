"""Correlation congruence for knowledge distillation (Peng et al., ICCV 2019, arXiv 1904.01802)."""

import torch
from torch import Tensor, nn


def correlation_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """The product of the student's errors on neighbouring samples, in RepDistiller's form of the method.

    With ``delta = |f_s - f_t|`` it is the inner product of ``delta`` of neighbours in the batch, averaged over
    the B - 1 pairs of neighbours. A batch of one has no pair and no loss.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's, (B, D). Gradients flow to both.

    Returns:
        Scalar.

    Raises:
        ValueError: for two tensors that are not of one shape (B, D).
    """
    if f_s.dim() != 2 or f_s.shape != f_t.shape:
        raise ValueError(
            f"correlation needs two (B, D) tensors of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    delta = (f_s.to(dtype) - f_t.to(dtype)).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


class Correlation(nn.Module):
    """``correlation_loss`` as a module."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return correlation_loss(f_s, f_t)
