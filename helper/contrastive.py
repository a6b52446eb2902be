"""Contrastive language-image pre-training (Radford et al., ICML 2021, arXiv 2103.00020): captions, loss, evaluation."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch import Tensor

from dataset import Split
from dataset.loader import Batch, Loader, on_device
from dataset.views import CIFAR_VIEWS, CLIP_NORMALIZATION, Views, normalize
from models.clip_teacher import tokenize
from models.encoders import TextEncoder

from .meters import EpochLog, Totals
from .runtime import autocast

# CLIP, section 2.5: a larger scale makes training unstable.
MAX_LOGIT_SCALE = 100

# CLIP's own prompts for small pictures, less those that only suit photographs of animals and things.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of the {}.",
    "a close-up of the {}.",
    "this is a {}.",
    "there is a {} in the picture.",
)


def caption_tokens(
    classes: list[str],
    templates: tuple[str, ...] = TEMPLATES,
    tokenize: Callable[[list[str]], Tensor] = tokenize,
) -> Tensor:
    """Every caption of every class, (classes, templates, length) int; by default in CLIP's tokens."""
    tokens = tokenize([template.format(name) for name in classes for template in templates])
    return tokens.view(len(classes), len(templates), -1)


def contrastive_loss(image: Tensor, text: Tensor, caption: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric contrastive loss of a batch in which captions repeat.

    Equal captions are positives of one another: the targets of an image are uniform over the batch's texts that
    equal its own, and those of a text over the images that it describes. The B x B loss follows exactly from the
    K distinct captions, a caption that occurs n times counting n times in the denominators.

    Args:
        image: embeddings, (B, D), of any norm.
        text: embeddings of the distinct captions, (K, D), of any norm.
        caption: (B,) integers, each image's row of ``text``; every row occurs.
        logit_scale: scalar, the inverse temperature.

    Returns:
        Scalar, the mean over the batch and both directions, computed in float32 or better.
    """
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, torch.float32)
        image, text = F.normalize(image.to(dtype), dim=1), F.normalize(text.to(dtype), dim=1)
        logits = logit_scale * image @ text.T
        count = torch.bincount(caption, minlength=len(text)).to(dtype)
        positive = logits.gather(1, caption[:, None]).mean()
        over_texts = torch.logsumexp(logits + count.log(), dim=1).mean()
        over_images = (torch.logsumexp(logits, dim=0) * count).sum() / len(image)
        return (over_texts + over_images) / 2 - positive


class Images:
    """Pixels of a loader's batches at a CLIP's resolution, in the views that the loader drew.

    Args:
        split: the images that the loader's rows refer to.
        resolution: height and width of the result, in pixels.
        device: where the pixels are made, and the images kept where they fit.
        views: of the data set.
    """

    def __init__(self, split: Split, resolution: int, device: torch.device, views: Views = CIFAR_VIEWS):
        self.images = on_device(split.images, device)
        self.resolution = resolution
        self.views = views

    def __call__(self, batch: Batch) -> Tensor:
        """(B, 3, resolution, resolution) float32, normalised as CLIP's inputs are."""
        stored = self.images[batch.index.to(self.images.device)].to(batch.index.device)
        pixels = self.views.teacher(stored, batch.index, batch.teacher_view, self.resolution)
        return normalize(pixels, CLIP_NORMALIZATION)


def contrastive_backward(
    model: CLIP, image: Tensor, tokens: Tensor, caption: Tensor, scaler: torch.amp.GradScaler, opt
) -> Tensor:
    """Add the gradients of ``contrastive_loss`` to the model's, in memory that ``opt.micro_batch`` bounds.

    A batch of more images than that is encoded twice (GradCache, Gao et al., RepL4NLP 2021): once without a
    graph, for the loss and its gradients at the embeddings, and once more, chunk by chunk, to carry these on to
    the weights. The result is that of the whole batch at once, up to rounding, where an encoder's samples do not
    see one another; batch norm sees the chunks, and updates its running statistics in both passes.

    Args:
        model: the CLIP.
        image: normalised pixels, (B, 3, H, W).
        tokens: of the distinct captions, (K, L).
        caption: (B,), each image's row of ``tokens``.
        scaler: of the loss.

    Returns:
        The loss, a scalar without a graph.
    """

    def encode(encoder: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # A context of its own each time: autocast would hand weights that it cast without a graph to the next pass.
        with autocast(opt.device, opt.amp):
            return encoder(inputs)

    sides = ((model.encode_image, image), (model.encode_text, tokens))
    if opt.micro_batch is None or len(image) <= opt.micro_batch:
        embeddings = [encode(encoder, inputs) for encoder, inputs in sides]
        loss = contrastive_loss(*embeddings, caption, model.logit_scale.exp())
        scaler.scale(loss).backward()
        return loss.detach()

    with torch.no_grad():
        embeddings = [torch.cat([encode(f, part) for part in x.split(opt.micro_batch)]) for f, x in sides]
    for embedding in embeddings:
        embedding.requires_grad_()
    loss = contrastive_loss(*embeddings, caption, model.logit_scale.exp())
    scaler.scale(loss).backward()
    for (encoder, inputs), embedding in zip(sides, embeddings, strict=True):
        chunks = zip(inputs.split(opt.micro_batch), embedding.grad.split(opt.micro_batch), strict=True)
        for part, gradient in chunks:
            encode(encoder, part).backward(gradient)
    return loss.detach()


def train_contrastive(
    epoch: int,
    loader: Loader,
    pixels: Images,
    model: CLIP,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    opt,
) -> dict[str, float]:
    """One epoch of contrastive training; each image's template is drawn anew from PyTorch's global generator.

    Args:
        epoch: counted from 1.
        pixels: turns the loader's batches into images.
        tokens: (classes, templates, length), see ``caption_tokens``.

    Returns:
        train_loss, logit_scale and images_per_second.

    Raises:
        NonFiniteLoss: the loss is not finite; seen at the next print.
    """
    model.train()
    totals = Totals()
    log = EpochLog(f"Epoch {epoch}", loader, opt.print_freq, opt.epochs - epoch, totals)
    total = opt.epochs * len(loader)
    for step, batch in enumerate(loader.epoch(epoch), start=1):
        rate = learning_rate((epoch - 1) * len(loader) + step, total, opt)
        for group in optimizer.param_groups:
            group["lr"] = rate
        template = torch.randint(tokens.shape[1], batch.target.shape).to(batch.target.device)
        captions, caption = (batch.target * tokens.shape[1] + template).unique(return_inverse=True)
        optimizer.zero_grad(set_to_none=True)
        loss = contrastive_backward(model, pixels(batch), tokens.flatten(0, 1)[captions], caption, scaler, opt)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        totals.add({"train_loss": loss}, {"logit_scale": model.logit_scale.detach().exp()}, len(batch.target))
        log.update(step, len(batch.target))
    return log.result()


def learning_rate(step: int, total: int, opt) -> float:
    """The rate of one step, counted from 1: a linear warm-up over ``opt.warmup`` of all steps, then half a cosine."""
    warmup = opt.warmup * total
    if step <= warmup:
        return opt.learning_rate * step / warmup
    return opt.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup + 1)))


@torch.no_grad()
def class_embeddings(model: CLIP | TextEncoder, tokens: Tensor) -> Tensor:
    """Zero-shot classifier weights (CLIP, section 3.1.4): each class's mean over its normalised captions.

    Args:
        model: the CLIP, or its text encoder.
        tokens: (classes, templates, length), see ``caption_tokens``.

    Returns:
        (classes, D) float32, of unit norm.
    """
    text = torch.cat([model.encode_text(part) for part in tokens.flatten(0, 1).split(500)])
    text = F.normalize(text.float(), dim=1).view(*tokens.shape[:2], -1)
    return F.normalize(text.mean(dim=1), dim=1)


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, loader: Loader, pixels: Images, tokens: Tensor, opt) -> float:
    """Percentage of a split's images that are most similar to the captions of their own class."""
    model.eval()
    with autocast(opt.device, opt.amp):
        weights = class_embeddings(model, tokens)
        correct = 0
        for batch in loader.epoch():
            similarity = model.encode_image(pixels(batch)).float() @ weights.T
            correct += (similarity.argmax(dim=1) == batch.target).sum()
    return 100 * correct.item() / loader.num_samples
