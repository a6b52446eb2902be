"""Contrastive language-image pre-training (Radford et al., ICML 2021, arXiv 2103.00020): captions, loss, evaluation."""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch import Tensor, nn

from dataset import Split
from dataset.loader import Batch, Loader, deal, on_device, take
from dataset.views import CIFAR_VIEWS, CLIP_NORMALIZATION, Views, normalize
from models.clip_teacher import tokenize
from models.encoders import TextEncoder

from . import distributed
from .runtime import autocast, compiled
from .step import Step
from .training import Training, build_scaler

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


def contrastive_loss(
    image: Tensor, text: Tensor, caption: Tensor, logit_scale: Tensor, shares: Sequence[int] | None = None
) -> Tensor:
    """CLIP's symmetric contrastive loss of a batch in which captions repeat.

    Equal captions are positives of one another: the targets of an image are uniform over the batch's texts that
    equal its own, and those of a text over the images that it describes. The B x B loss follows exactly from the
    K distinct captions: a caption that occurs n times counts n times in the denominators.

    With many processes each has its share of the images and of the distinct captions, the latter as ``deal`` gives it.
    The texts are gathered, and each process holds the logits of its own images alone. The processes add up each
    text's normaliser, which is over all images.

    Args:
        image: embeddings, (B, D), of any norm; with many processes, this one's.
        text: embeddings of the distinct captions, (K, D), of any norm; with many processes, this one's.
        caption: (B,) integers, each image's row of ``text``, for all processes' images; every row occurs.
        logit_scale: scalar, the inverse temperature.
        shares: images on each process, in order of rank, where there are several.

    Returns:
        Scalar, the mean over the batch and both directions, computed in float32 or better. With many processes each
        returns its part; the loss is the mean of the parts, as the gradient is.
    """
    processes = 1 if shares is None else len(shares)
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, torch.float32)
        image, text = F.normalize(image.to(dtype), dim=1), F.normalize(text.to(dtype), dim=1)
        count = torch.bincount(caption).to(dtype)
        if shares is not None:
            text = distributed.gather(text, deal(len(count), processes), alike=False)
        logits = logit_scale * image @ text.T
        positive = logits.gather(1, distributed.own(caption, shares)[:, None]).sum()
        over_texts = torch.logsumexp(logits + count.log(), dim=1).sum()
        over_images = (distributed.logsumexp(logits) * count).sum()
        return ((processes * over_texts + over_images) / 2 - processes * positive) / len(caption)


class Images:
    """Pixels of a loader's batches at a CLIP's resolution, in the views that the loader drew.

    Args:
        split: the images that the loader's rows refer to.
        resolution: height and width of the result, in pixels.
        device: where the pixels are made, and where the images are kept if they fit.
        views: the data set's views.
    """

    def __init__(self, split: Split, resolution: int, device: torch.device, views: Views = CIFAR_VIEWS):
        self.images = on_device(split.images, device)
        self.resolution = resolution
        self.views = views

    def __call__(self, batch: Batch) -> Tensor:
        """(B, 3, resolution, resolution) float32, normalised as CLIP's inputs are."""
        stored = take(self.images, batch.index, batch.index.device)
        pixels = self.views.teacher(stored, batch.index, batch.teacher_view, self.resolution)
        return normalize(pixels, CLIP_NORMALIZATION)


class Encoders(nn.Module):
    """Both encoders of a CLIP and the scale of its logits, in one pass.

    Args:
        model: the CLIP.
        opt: ``device``, ``amp`` and ``compile``.
        full: number of images in most passes; the image encoder is compiled for it.
    """

    def __init__(self, model: CLIP, opt, full: int):
        super().__init__()
        self.model, self.opt, self.full = model, opt, full
        self.compiled = compiled(lambda image: model.encode_image(image)) if opt.compile == "on" else None

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of pixels (B, 3, H, W) and of captions (K, L), and the scale of their products."""
        encode_image = self.compiled if self.compiled and len(image) == self.full else self.model.encode_image
        # Each pass has its own context: autocast would reuse weights that an earlier pass cast without a graph.
        with autocast(self.opt.device, self.opt.amp):
            image, text = self._encode(encode_image, image), self._encode(self.model.encode_text, tokens)
        return image, text, self.model.logit_scale.exp()

    def _encode(self, encoder: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if len(inputs):
            return encoder(inputs)
        # CLIP's encoders take no empty batch. The result requires a gradient: its exchange needs every process.
        return torch.zeros(0, self.model.text_projection.shape[1], device=inputs.device, requires_grad=True)


def chunks(count: int, size: int) -> list[slice]:
    """Slices of ``size`` rows that cover ``count`` rows; a single last row joins the one before, for batch norm."""
    ends = [*range(size, count - 1, size), count]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class ContrastiveStep(Step):
    """A step of contrastive training; ``opt.micro_batch`` bounds its memory.

    A larger batch is encoded twice (GradCache, Gao et al., RepL4NLP 2021). The first pass, without a graph, gives the
    loss and its gradients at the embeddings. The second carries these on to the weights, chunk by chunk. The result is
    that of the whole batch, up to rounding, where an encoder's samples do not see one another. Batch norm sees the
    chunks, and updates its running statistics in both passes. With many processes each splits its own share.

    Every step draws each image's template from PyTorch's global generator, alike on every process.

    Args:
        model: the CLIP.
        pixels: turns the loader's batches into images.
        tokens: (classes, templates, length), see ``caption_tokens``.
        optimizer: optimiser of all weights.
        scaler: scales the gradients.
        loader: makes the batches.
        opt: ``device``, ``amp``, ``compile`` and ``micro_batch``.
    """

    def __init__(
        self,
        model: CLIP,
        pixels: Images,
        tokens: Tensor,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        loader: Loader,
        opt,
    ):
        share = loader.shares(loader.batch_size)[loader.rank]
        encoders = Encoders(model, opt, min(share, opt.micro_batch or share))
        super().__init__(encoders, [optimizer], scaler, loader, static=False)  # a process may have no caption
        self.model, self.pixels, self.tokens, self.micro_batch = model, pixels, tokens, opt.micro_batch
        highest = math.log(MAX_LOGIT_SCALE)
        optimizer.register_step_post_hook(lambda *_: model.logit_scale.data.clamp_(max=highest))

    def _backward(self, batch: Batch, epoch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tokens, caption = self._captions(batch)
        image, tokens = self.pixels(batch), distributed.own(tokens, deal(len(tokens), self.loader.processes))
        most = len(image) if batch.shares is None else max(batch.shares)  # so that all processes decide alike
        if self.micro_batch is None or most <= self.micro_batch:
            embeddings = self.losses(image, tokens)
            loss = contrastive_loss(*embeddings[:2], caption, embeddings[2], batch.shares)
            self.scaler.scale(loss).backward()
        else:
            loss = self._backward_in_chunks(image, tokens, caption, batch.shares)
        whole = distributed.total(loss.detach() / self.loader.processes)
        return {"train_loss": whole}, {"logit_scale": self.model.logit_scale.detach().exp()}

    def _captions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens of the distinct captions of all processes, (K, L), and each image's row of them, (B,)."""
        templates, device = self.tokens.shape[1], batch.target.device
        count = len(batch.target) if batch.shares is None else sum(batch.shares)
        template = distributed.own(torch.randint(templates, (count,)), batch.shares).to(device)
        drawn = distributed.gather(batch.target * templates + template, batch.shares)
        distinct, caption = drawn.unique(return_inverse=True)
        return self.tokens.flatten(0, 1)[distinct], caption

    def _backward_in_chunks(
        self, image: Tensor, tokens: Tensor, caption: Tensor, shares: Sequence[int] | None
    ) -> Tensor:
        parts = chunks(max(len(image), len(tokens), 1), self.micro_batch)
        with torch.no_grad():
            images, texts, scales = zip(*(self.losses(image[part], tokens[part]) for part in parts), strict=True)
            leaves = [torch.cat(images), torch.cat(texts), scales[0]]
        images, texts, scale = (leaf.requires_grad_() for leaf in leaves)
        loss = contrastive_loss(images, texts, caption, scale, shares)
        self.scaler.scale(loss).backward()
        for part in parts:
            last = part == parts[-1]  # its pass shares what all have added up
            with contextlib.nullcontext() if last else distributed.unsynchronised(self.losses):
                outputs = self.losses(image[part], tokens[part])
                of_scale = scale.grad if last else torch.zeros_like(scale)
                torch.autograd.backward(outputs, (images.grad[part], texts.grad[part], of_scale))
        return loss


def learning_rate(step: int, total: int, opt) -> float:
    """The rate of one step, counted from 1: a linear warm-up over ``opt.warmup`` of all steps, then half a cosine."""
    warmup = opt.warmup * total
    if step <= warmup:
        return opt.learning_rate * step / warmup
    return opt.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup + 1)))


@torch.no_grad()
def class_embeddings(model: CLIP | TextEncoder, tokens: Tensor) -> Tensor:
    """Zero-shot classifier weights (CLIP, section 3.1.4): each class's mean over its normalised captions.

    Many processes encode the classes together.

    Args:
        model: the CLIP, or its text encoder.
        tokens: (classes, templates, length), see ``caption_tokens``.

    Returns:
        (classes, D) float32, of unit norm.
    """
    shares = deal(len(tokens), distributed.count())
    captions = distributed.own(tokens, shares).flatten(0, 1)
    text = [model.encode_text(part) for part in captions.split(500)] if len(captions) else []
    dim = model.dim if isinstance(model, TextEncoder) else model.text_projection.shape[1]
    text = torch.cat([torch.zeros(0, dim, device=tokens.device), *text])
    text = F.normalize(text, dim=1).view(-1, tokens.shape[1], text.shape[1])
    return distributed.gather(F.normalize(text.mean(dim=1), dim=1), shares)


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, loader: Loader, pixels: Images, tokens: Tensor, opt) -> float:
    """Percentage of a split's images that are most similar to the captions of their own class."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=tokens.device)
    with autocast(opt.device, opt.amp):
        weights = class_embeddings(model, tokens)
        for batch in loader.epoch():
            if len(batch.target):
                similarity = model.encode_image(pixels(batch)).float() @ weights.T
                correct += (similarity.argmax(dim=1) == batch.target).sum()
    return 100 * distributed.total(correct).item() / loader.num_samples


def train_clip(opt, model: CLIP, pixels: Images, tokens: Tensor, loader: Loader) -> Training:
    """The training of a CLIP from scratch on images and captions, with CLIP's own AdamW and schedule.

    CLIP decays all weights but gains and biases (section 2.5); positions and token embeddings are decayed too. The
    class token is a vector, and is not decayed, as in open_clip.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": opt.weight_decay}, {"params": others, "weight_decay": 0}],
        lr=opt.learning_rate,
        betas=(0.9, 0.98),  # CLIP's, as eps is
        eps=1e-6,
        fused=True,
    )
    step = ContrastiveStep(model, pixels, tokens, optimizer, build_scaler(opt), loader, opt)

    def rate(epoch: int, number: int) -> float:
        return learning_rate((epoch - 1) * len(loader) + number, opt.epochs * len(loader), opt)

    return Training(opt, step, model, {"model": model, "optimizer": optimizer}, rate=rate)
