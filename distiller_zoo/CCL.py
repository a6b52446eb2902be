"""Complementary contrast, the CCL baseline of EGA (Ma et al., BMVC 2022): supervised NCE and a symmetric KD."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keeps the logarithm of a probability finite, as in EGA's release.
_EPS = 1e-10


def _unit(f: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero, with zero gradient."""
    return F.normalize(torch.where(f.any(dim=1, keepdim=True), f, 0), dim=1)


def _nce(f_s: Tensor, f_t: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The loss of NCE.py, repeated so that this file works alone."""
    p = F.softmax(_unit(f_s) @ _unit(f_t).T / temperature, dim=1)
    same = target[:, None] == target
    attract = torch.where(same, -torch.log(p + _EPS), 0).sum(dim=1) / same.sum(dim=1)
    repel = torch.where(same, 0, -torch.log(1 - p + _EPS)).sum(dim=1) / (~same).sum(dim=1).clamp(min=1)
    return (attract + repel).mean()


def ccl_loss(
    f_s: Tensor, f_t: Tensor, target: Tensor, logit_s: Tensor, logit_t: Tensor, temperature: float = 0.1
) -> Tensor:
    """Supervised NCE between embeddings plus the mean of KL(t || s) and KL(s || t) between class distributions.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's embeddings, (B, D). Gradients flow to both.
        target: classes, (B,).
        logit_s: the student's logits, (B, classes).
        logit_t: the teacher's logits, (B, classes). Gradients flow to both.
        temperature: NCE's temperature; that of the class distributions is 1.

    Returns:
        Scalar, the mean over the batch; if all samples have the same class, none repels another.

    Raises:
        ValueError: the shapes are other than these.
    """
    batch = f_s.shape[:1]
    if f_s.dim() != 2 or f_s.shape != f_t.shape or target.shape != batch:
        shapes = ", ".join(str(tuple(x.shape)) for x in (f_s, f_t, target))
        raise ValueError(f"CCL needs embeddings (B, D), (B, D) and targets (B,), got {shapes}")
    if logit_s.dim() != 2 or logit_s.shape != logit_t.shape or logit_s.shape[:1] != batch:
        shapes = f"{tuple(logit_s.shape)} and {tuple(logit_t.shape)}"
        raise ValueError(f"CCL needs two (B, classes) tensors of logits of {len(f_s)} samples, got {shapes}")
    with torch.autocast(f_s.device.type, enabled=False):
        dtype = torch.float32
        for x in (f_s, f_t, logit_s, logit_t):
            dtype = torch.promote_types(dtype, x.dtype)
        log_p_s, log_p_t = F.log_softmax(logit_s.to(dtype), dim=1), F.log_softmax(logit_t.to(dtype), dim=1)
        # This is the sum of the two divergences.
        symmetric = ((log_p_t.exp() - log_p_s.exp()) * (log_p_t - log_p_s)).sum(dim=1).mean()
        return _nce(f_s.to(dtype), f_t.to(dtype), target, temperature) + symmetric / 2


class CCL(nn.Module):
    """``ccl_loss`` at NCE's temperature 0.1."""

    def forward(self, f_s: Tensor, f_t: Tensor, target: Tensor, logit_s: Tensor, logit_t: Tensor) -> Tensor:
        return ccl_loss(f_s, f_t, target, logit_s, logit_t)
