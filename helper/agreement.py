"""How near a student is to its teacher on pictures that it was not trained on, without a label."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.loader import Loader
from models.heads import Classifier, Student

from . import distributed
from .objective import Objective
from .runtime import autocast
from .teacher import CnnTeacher, EncoderTeacher

# The neighbours that are compared, and the pictures at most that they are looked for among.
NEIGHBOURS = 10
_PICTURES = 5000


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features (N, D) and (N, D') of the same samples, from 0 to 1.

    Kornblith et al., ICML 2019, equation 4: neither rotation nor isotropic scaling of either changes it.
    """
    x, y = (f.double() - f.double().mean(dim=0) for f in (x, y))
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((y.T @ x).square().sum() / norms)


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine similarity of embeddings (N, D) and (N, D) of the same samples."""
    return float(F.cosine_similarity(x.double(), y.double()).mean())


def neighbour_overlap(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Percentage of each sample's k nearest neighbours that are the same in both embeddings, (N, D) and (N, D').

    Neighbours are those of the highest cosine similarity; a sample is none of its own. With k or fewer others all of
    them are neighbours, and the result is 100.
    """
    x, y = (F.normalize(f.float(), dim=1) for f in (x, y))
    k, shared = min(k, len(x) - 1), 0
    for rows in torch.arange(len(x)).split(1000):
        near = []
        for f in (x, y):
            similarity = f[rows] @ f.T
            similarity[torch.arange(len(rows)), rows] = -torch.inf
            near.append(similarity.topk(k, dim=1).indices)
        shared += int((near[0][:, :, None] == near[1][:, None]).sum())
    return 100 * shared / max(k * len(x), 1)


@torch.no_grad()
def held_out(
    loader: Loader,
    student: Student | Classifier,
    teacher: EncoderTeacher | CnnTeacher,
    objective: Objective,
    opt,
) -> dict[str, float | None]:
    """The loss of distillation on pictures that are held out, and how near the embeddings of both are.

    The loss is the mean over batches as in training, each in the test view, with the weights a and b of the last epoch.
    Embeddings are those in the joint space; without one they are the pooled features. At most some thousand pictures
    are compared.

    Args:
        loader: batches of the same size as in training.
        opt: ``device`` and ``amp``.

    Returns:
        heldout_loss, None where the loss knows training images by their number; heldout_cka; heldout_cosine, None
        without a joint space; heldout_knn, see ``neighbour_overlap``.
    """
    student.eval()
    objective = copy.deepcopy(objective)  # statistics and memories stay as they are
    objective.captured_beta = None
    if objective.criterion is not None:
        objective.criterion.eval()
    known = "index" in objective.feeds
    losses, count, embeddings = torch.zeros((), device=loader.device), 0, []
    for batch in loader.epoch():
        with autocast(opt.device, opt.amp):
            out_s = student(batch.image)
        out_t = teacher(loader.name, batch)
        samples = sum(batch.shares or (len(batch.target),))
        if not known:
            loss, _ = objective(out_s, out_t, batch, max(objective.beta_warmup, 1))
            losses += loss * samples
        if count < _PICTURES:
            embeddings.append((out_s.embedding.float().cpu(), out_t.embedding.float().cpu()))
        count += samples
    parts = [part for own in distributed.collect(embeddings) for part in own]
    f_s, f_t = (torch.cat(column) for column in zip(*parts, strict=True))
    joint = isinstance(teacher, EncoderTeacher) or teacher.head is not None
    return {
        # The mean of the processes' losses is that of the whole batch.
        "heldout_loss": None if known else float(distributed.total(losses)) / count / distributed.count(),
        "heldout_cka": linear_cka(f_s, f_t),
        "heldout_cosine": mean_cosine(f_s, f_t) if joint else None,
        "heldout_knn": neighbour_overlap(f_s, f_t),
    }
