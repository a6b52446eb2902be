"""What a loss learns about its teacher before training: statistics, costs between classes, a queue."""

import torch
from torch import Tensor

from dataset.loader import Loader, eval_batch_size
from models import create_text_encoder

from .data import Loaders
from .objective import Objective
from .options import understands_text
from .teacher import CnnTeacher, EncoderTeacher


@torch.no_grad()
def training_embeddings(teacher: EncoderTeacher | CnnTeacher, loader: Loader) -> Tensor:
    """The teacher's own embeddings (N, D) of the training rows, in their order, each in its test view.

    Many processes each look all of them up; a CNN computes them, which takes as long as a test pass on these images.
    """
    size = eval_batch_size(loader.device.type, loader.views.size)
    rows = loader.in_order(size, images=not isinstance(teacher, EncoderTeacher))
    return torch.cat([teacher(rows.name, batch).features[-1].float() for batch in rows.epoch()])


@torch.no_grad()
def caption_embeddings(classes: list[str], opt) -> Tensor:
    """A CLIP's embeddings of unit norm of each class's captions, (classes, captions, D), on the CPU."""
    from .contrastive import caption_tokens  # here, as it imports CLIP

    text = create_text_encoder(opt.clip_mode, opt.clip_root)
    tokens = caption_tokens(classes, tokenize=text.tokenize)
    embedded = torch.cat([text.encode_text(part).float() for part in tokens.flatten(0, 1).split(500)])
    return torch.nn.functional.normalize(embedded, dim=1).view(*tokens.shape[:2], -1)


def acquaint(objective: Objective, teacher: EncoderTeacher | CnnTeacher | None, loaders: Loaders, opt) -> None:
    """Let a loss that asks for it learn about its teacher, whose embeddings are open; see ``Method``.

    This depends on the options and on no earlier step, so that a resumed run does it anew.
    """
    if not (hasattr(objective.criterion, "acquaint") and objective.beta):
        return

    def names() -> Tensor | None:
        return caption_embeddings(loaders.classes, opt).to(opt.device) if understands_text(opt) else None

    train = loaders.train
    target = train.targets[train.rows.to(train.device)]
    objective.criterion.acquaint(training_embeddings(teacher, train), target, names)
