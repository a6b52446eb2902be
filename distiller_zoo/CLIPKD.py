"""CLIP-KD: An Empirical Study of CLIP Model Distillation (Yang et al., CVPR 2024, arXiv 2307.12732)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# CLIP's own inverse temperature at the end of its training, and at the start of a student's.
_CLIP_SCALE, _SCALE = 100.0, 1 / 0.07


class FeatureMimicry(nn.Module):
    """Squared error between embeddings of unit norm (FD).

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's; a linear layer projects to it where it differs.
    """

    def __init__(self, s_dim: int, t_dim: int):
        super().__init__()
        self.embed = nn.Identity() if s_dim == t_dim else nn.Linear(s_dim, t_dim)

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Embeddings (B, s_dim) against (B, t_dim), a scalar, the mean over all elements."""
        return F.mse_loss(F.normalize(self.embed(f_s), dim=1), F.normalize(f_t, dim=1))


class InteractiveContrastive(nn.Module):
    """The student's image and text, each contrasted with the teacher's other half (ICL).

    Args:
        scale: the inverse temperature to begin with, which is learned. As in the authors' code it is CLIP's logarithm
            and is not exponentiated.
    """

    def __init__(self, scale: float = math.log(_SCALE)):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, image_s: Tensor, text_s: Tensor, image_t: Tensor, text_t: Tensor) -> Tensor:
        """Embeddings (B, D), the teacher's of unit norm; a scalar, the mean over the batch and both halves."""
        own = torch.arange(len(image_s), device=image_s.device)
        logits = (self.scale * F.normalize(x, dim=1) @ y.T for x, y in ((image_s, text_t), (text_s, image_t)))
        return sum(F.cross_entropy(x, own) for x in logits) / 2


class ContrastiveRelation(nn.Module):
    """KL divergences between the similarities of images and texts (CRD).

    Args:
        scale_s, scale_t: inverse temperatures of student and teacher.
    """

    def __init__(self, scale_s: float, scale_t: float):
        super().__init__()
        self.scale_s = scale_s
        self.scale_t = scale_t

    def forward(self, image_s: Tensor, text_s: Tensor, image_t: Tensor, text_t: Tensor) -> Tensor:
        """Embeddings (B, D), the teacher's of unit norm; a scalar, the mean over images and over texts."""
        logit_s = self.scale_s * F.normalize(image_s, dim=1) @ F.normalize(text_s, dim=1).T
        logit_t = self.scale_t * image_t @ text_t.T
        return (_divergence(logit_s, logit_t) + _divergence(logit_s.T, logit_t.T)) / 2


def _divergence(logit_s: Tensor, logit_t: Tensor) -> Tensor:
    """KL divergence of softmax distributions, the mean over rows."""
    log_s, log_t = F.log_softmax(logit_s, dim=1), F.log_softmax(logit_t, dim=1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


class CLIPKD(nn.Module):
    """The three terms for images alone.

    The classes' names stand for the texts where ``acquaint`` is given their embeddings: the contrast and the relation
    run over the classes. Otherwise the teacher's images stand for them.

    Args:
        s_dim: width of the student's embeddings.
        t_dim: width of the teacher's.
        weights: of mimicry, contrast and relation; the authors'.
    """

    def __init__(self, s_dim: int, t_dim: int, weights: tuple[float, float, float] = (2000.0, 1.0, 1.0)):
        super().__init__()
        self.mimicry = FeatureMimicry(s_dim, t_dim)
        self.contrast = InteractiveContrastive()
        self.weights = weights
        self.register_buffer("text", None, persistent=False)

    def acquaint(self, f_t: Tensor, target: Tensor, names: Callable[[], Tensor | None]) -> None:
        """Take the embeddings of the classes' captions, (classes, captions, t_dim), if the teacher has any."""
        captions = names()
        if captions is not None:
            self.text = F.normalize(F.normalize(captions, dim=2).mean(dim=1), dim=1)

    def terms(self, f_s: Tensor, f_t: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss.

        Args:
            f_s: the student's embeddings, (B, s_dim).
            f_t: the teacher's, (B, t_dim).
            label: (B,) class indices, -1 where the class is not known: such a sample has no contrast with classes.
        """
        n_s, n_t = F.normalize(self.mimicry.embed(f_s), dim=1), F.normalize(f_t, dim=1)
        similar_s, similar_t = (x @ (n_t if self.text is None else self.text).T for x in (n_s, n_t))
        if self.text is None:
            # Both halves of the contrast are the same one.
            contrast = F.cross_entropy(self.contrast.scale * similar_s, torch.arange(len(n_s), device=n_s.device))
            logits = _SCALE * similar_s, _SCALE * similar_t
            relation = (_divergence(*logits) + _divergence(*(x.T for x in logits))) / 2
        else:
            logits = self.contrast.scale * similar_s
            contrast = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") / len(n_s)
            relation = _divergence(_CLIP_SCALE * similar_s, _CLIP_SCALE * similar_t)
        values = (F.mse_loss(n_s, n_t), contrast, relation)
        names = ("mimicry", "contrast", "relation")
        return {name: weight * x for name, weight, x in zip(names, self.weights, values, strict=True)}

    def forward(self, f_s: Tensor, f_t: Tensor, label: Tensor) -> Tensor:
        """The sum of the terms, a scalar."""
        return sum(self.terms(f_s, f_t, label).values())
