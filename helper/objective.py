"""The student's loss on one batch."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.loader import Batch
from distiller_zoo import METHODS, Networks, TwoStage, kd_loss, standardize_logits
from errors import InputError
from models.heads import Classifier, Outputs, Student

from . import distributed
from .data import Loaders
from .teacher import CnnTeacher, EncoderTeacher


def mean_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The cross-entropy of logits (B, classes), averaged over the images of a batch.

    Only labelled images enter the sum; it is divided by the batch size. A labelled image thus weighs the same in every
    batch. With a mean over labelled images alone, the only one of a batch would weigh as much as a whole batch, and a
    head on a frozen encoder's embeddings diverges. Where images are mixed, each of the two has its class, and the loss
    is mixed likewise.
    """
    if batch.mix is not None:
        own, other = (
            F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
            for target in (batch.target, batch.target.flip(0))
        )
        return (batch.mix * own + (1 - batch.mix) * other).sum() / max(len(batch.target), 1)
    if batch.labelled is None and len(batch.target):
        return F.cross_entropy(logits, batch.target)
    return F.cross_entropy(logits, batch.target, ignore_index=-1, reduction="sum") / max(len(batch.target), 1)


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum of an objective's terms, given by name, for this process's share."""
    return sum(terms[name] for name in ("cls", "kd", "distill") if name in terms)


def _own_embedding(out_s: Outputs, out_t: Outputs) -> Tensor:
    """The student's pooled features; its embedding where that is in the space of an encoder without a head."""
    return out_s.features[-1] if out_t.logits is not None else out_s.embedding


@dataclass
class Objective:
    """The student's loss: ``r * cls + a * kd + b * distill``.

    Attributes:
        criterion: the method's loss, or None.
        feeds: names of its arguments, in order (see ``Method``).
        gamma, alpha, beta: the weights r, a and b.
        kd_T: temperature of the kd term.
        clip: whether f_s and f_t are projected embeddings (a frozen encoder's protocol) or pooled features.
        beta_warmup: epochs over which beta grows to its value.
        logit_standard: standardise the logits that kd and the method see.
        relational: the criterion compares samples, so that it has to see those of all processes.
        captured_beta: a scalar that takes the place of ``beta_in`` while a step is captured.
    """

    criterion: nn.Module | None
    feeds: tuple[str, ...]
    gamma: float
    alpha: float
    beta: float
    kd_T: float
    clip: bool = True
    beta_warmup: int = 0
    logit_standard: bool = False
    relational: bool = False
    captured_beta: Tensor | None = None

    @property
    def classifies(self) -> bool:
        """Whether a term trains the student's logits."""
        return bool(self.gamma or self.alpha or (self.beta and "logit_s" in self.feeds))

    @property
    def needs_teacher(self) -> bool:
        """Whether a term uses the teacher; a method's first stage is no term."""
        return bool(self.alpha or (self.feeds and self.beta))

    @property
    def needs_maps(self) -> bool:
        """Whether the criterion is fed the networks' maps."""
        return not {"maps_s", "feat_s"}.isdisjoint(self.feeds)

    def beta_in(self, epoch: int) -> float:
        """The weight b in an epoch, counted from 1."""
        return self.beta * min(epoch / self.beta_warmup, 1) if self.beta_warmup else self.beta

    def __call__(
        self, out_s: Outputs, out_t: Outputs | None, batch: Batch, epoch: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its weighted terms by name; no gradient reaches the teacher.

        With many processes, the mean of their losses is the loss of the whole batch. A term that is a mean over
        samples is that of this process's share; without a sample there is no such term, and the loss is zero. An image
        without a label counts as zero in the classification.
        """
        terms, parts = {}, {}
        if len(batch.target):
            terms["cls"] = self.gamma * mean_cross_entropy(out_s.logits.float(), batch)
            if self.alpha and out_t is not None:
                terms["kd"] = self.alpha * kd_loss(*self._fed(("logit_s", "logit_t"), out_s, out_t, batch), self.kd_T)
        # Without a sample the loss is zero, but has a gradient: DDP waits for it.
        loss = batch.weight * total_loss(terms) if terms else out_s.features[-1].sum()
        if self.feeds and self.beta and out_t is not None and (self.relational or terms):
            fed = self._fed(self.feeds, out_s, out_t, batch)
            # A loss that takes the shares itself knows a cheaper way than to gather.
            if self.relational and "shares" not in self.feeds:
                fed = [distributed.gather(x, batch.shares) for x in fed]
            # A loss of several terms names them, so that each is logged.
            named = self.criterion.terms(*fed) if hasattr(self.criterion, "terms") else {}
            beta = self.beta_in(epoch) if self.captured_beta is None else self.captured_beta
            parts = {name: beta * value for name, value in named.items()}
            value = sum(parts.values()) if parts else self.criterion(*fed)
            value = sum(value) if isinstance(value, (list, tuple)) else value
            terms["distill"] = value if parts else beta * value
            loss = loss + (1 if self.relational else batch.weight) * terms["distill"]
        return loss, {**terms, **parts}

    def _fed(self, names: tuple[str, ...], out_s: Outputs, out_t: Outputs, batch: Batch) -> list:
        """The values that a method's row names, in float32; no gradient reaches the teacher's."""

        def s(x: Tensor) -> Tensor:
            return x.float()

        def t(x: Tensor) -> Tensor:
            return x.detach().float()

        def logit(x: Tensor) -> Tensor:
            return standardize_logits(x) if self.logit_standard else x

        table = {
            "joint_s": lambda: s(out_s.embedding),
            "joint_t": lambda: t(out_t.embedding),
            "f_s": lambda: s(out_s.embedding if self.clip else out_s.features[-1]),
            "f_t": lambda: t(out_t.embedding if self.clip else out_t.features[-1]),
            "own_s": lambda: s(_own_embedding(out_s, out_t)),
            "own_t": lambda: t(out_t.features[-1]),
            "logit_s": lambda: logit(s(out_s.logits)),
            "logit_t": lambda: logit(t(out_t.logits)),
            "maps_s": lambda: [s(x) for x in out_s.features[1:-1]],
            "maps_t": lambda: [t(x) for x in out_t.features[1:-1]],
            "feat_s": lambda: [s(x) for x in out_s.features],
            "feat_t": lambda: [t(x) for x in out_t.features],
            "target": lambda: batch.target,
            "label": lambda: batch.target,
            "index": lambda: batch.index,
            "shares": lambda: batch.shares,
        }
        return [table[name]() for name in names]


def build_objective(
    opt, student: Student | Classifier, teacher: EncoderTeacher | CnnTeacher | None, loaders: Loaders
) -> Objective:
    """The loss that the options describe, for these two networks and the images that they see, on the device.

    Raises:
        InputError: the method does not fit the networks.
    """
    method, clip = METHODS[opt.distill], bool(opt.clip_tn)
    build, feeds = method.with_teacher(clip)
    criterion = None
    if build is not None:
        criterion = build(opt, describe_networks(student, teacher, loaders.image_size, loaders.targets)).to(opt.device)
        if opt.sync_bn:
            criterion = nn.SyncBatchNorm.convert_sync_batchnorm(criterion)
    weights = (opt.gamma, opt.alpha, opt.beta)
    return Objective(criterion, feeds, *weights, opt.kd_T, clip, opt.beta_warmup, opt.logit_standard, method.relational)


@torch.no_grad()
def check_lone_image(
    loaders: Loaders,
    student: Student | Classifier,
    teacher: EncoderTeacher | CnnTeacher | None = None,
    objective: Objective | None = None,
) -> None:
    """Try a step of one image, if the run has one; a loader joins a single last image to others, if there are any.

    Args:
        objective: with a CNN teacher its criterion may have batch norm too.

    Raises:
        InputError: a batch norm in training sees a single value of each channel, which it cannot normalise.
    """
    if loaders.train.last > 1:
        return
    student, objective = copy.deepcopy((student, objective))  # statistics and memories stay as they are
    zero = torch.zeros(1, dtype=torch.int64, device=loaders.train.device)
    batch = Batch(zero, zero, torch.zeros(1, 3, *[loaders.image_size] * 2, device=zero.device), zero)
    try:
        out_s = student.train()(batch.image)
        if isinstance(teacher, CnnTeacher) and objective.criterion is not None:
            out_t = teacher(loaders.train.name, batch)
            objective(out_s, out_t, batch)
            if isinstance(objective.criterion, TwoStage):
                objective.criterion.init_loss(out_s.features, out_t.features)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "batch norm cannot take a step of one image with maps of one pixel: use --batch_size 2 or more "
            "and two training images or more"
        ) from error


@torch.no_grad()
def describe_networks(
    student: Student | Classifier, teacher: EncoderTeacher | CnnTeacher, image_size: int, targets: Tensor
) -> Networks:
    """The facts about the two networks that methods may ask for.

    Args:
        image_size: height and width of the student's images.
        targets: (N,) class of every training row, -1 for the rows that the loss will not see.
    """
    images = torch.zeros(2, 3, image_size, image_size, device=next(student.parameters()).device)
    out_s = student.eval()(images)
    shapes_s = [tuple(x.shape) for x in out_s.features]
    if isinstance(teacher, EncoderTeacher):
        dim = out_s.embedding.shape[1]
        own = {"headless": teacher.head is None, "num_classes": out_s.logits.shape[1]}
        return Networks(shapes_s, [(2, teacher.dim)], dim, dim, targets, **own)
    features, _ = teacher.features(images)
    shapes_t = [tuple(x.shape) for x in features]
    dims, classes = (shapes_s[-1][1], shapes_t[-1][1]), out_s.logits.shape[1]
    return Networks(shapes_s, shapes_t, *dims, targets, teacher.backbone, num_classes=classes)
