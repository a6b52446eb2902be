import functools
import math
from argparse import Namespace

import clip
import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP
from torch import Tensor

from dataset import Split
from dataset.loader import Loader
from dataset.views import CLIP_NORMALIZATION, normalize
from helper.contrastive import (
    MAX_LOGIT_SCALE,
    TEMPLATES,
    ContrastiveStep,
    Images,
    caption_tokens,
    class_embeddings,
    contrastive_loss,
    learning_rate,
    train_clip,
    zero_shot_accuracy,
)
from training import train_epoch

CPU = torch.device("cpu")
CLASSES = ["apple", "boy", "castle", "maple tree", "orchid"]


def options(**changed) -> Namespace:
    opt = {"device": "cpu", "amp": "off", "compile": "off", "micro_batch": None, "epochs": 2, "print_freq": 100}
    opt |= {"learning_rate": 1e-3, "warmup": 0.2, "weight_decay": 0.01, "save_steps": None, "seed": 0}
    return Namespace(**(opt | changed))


@pytest.fixture
def model() -> CLIP:
    """A CLIP without batch norm."""
    torch.manual_seed(0)
    return CLIP(32, 16, 1, 64, 8, 77, 49408, 64, 1, 1)


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def slow_loss(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """The B x B loss, one text per image, term by term."""
    texts = text[caption]
    size = len(image)
    logits = torch.stack(
        [
            torch.stack([scale * F.cosine_similarity(image[i], texts[j], dim=0) for j in range(size)])
            for i in range(size)
        ]
    )
    loss = 0
    for matrix in (logits, logits.T):
        for i in range(size):
            positives = [j for j in range(size) if caption[j] == caption[i]]
            log_p = matrix[i].log_softmax(dim=0)
            loss = loss - sum(log_p[j] for j in positives) / len(positives) / size / 2
    return loss


@pytest.mark.parametrize("caption", [[0, 1, 2, 3, 4, 5], [2, 0, 2, 1, 2, 0], [0, 0, 0]])
def test_loss_is_that_of_the_whole_batch(caption):
    torch.manual_seed(0)
    caption = torch.tensor(caption)
    inputs = [
        (torch.randn(len(caption), 8, dtype=torch.float64) * 3).requires_grad_(),
        torch.randn(int(caption.max()) + 1, 8, dtype=torch.float64).requires_grad_(),
        torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
    ]
    losses = [f(*inputs[:2], caption, inputs[2]) for f in (contrastive_loss, slow_loss)]
    torch.testing.assert_close(*losses, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_loss_is_clips_own_where_no_caption_repeats():
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 7, 16, dtype=torch.float64), dim=2)
    target, logits = torch.arange(7), 10 * image @ text.T
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, target, torch.tensor(10.0)), expected)


def test_loss_is_computed_in_float32_under_autocast():
    image, text = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(image, text, torch.arange(4), torch.tensor(10.0)).dtype == torch.float32


def one_step(model: CLIP, split: Split, tokens: Tensor, **changed) -> tuple[float, dict[str, Tensor]]:
    """The loss of all images as one batch, and every weight's gradient."""
    torch.manual_seed(1)
    loader = Loader(split, "train", len(split), CPU, training=True, images=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step = ContrastiveStep(model, Images(split, 16, CPU), tokens, optimizer, no_scaler(), loader, options(**changed))
    loss = train_epoch(1, step, 1, print_freq=100)["train_loss"]
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def noise() -> Split:
    return Split(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 1, 1, 0]))


def test_a_step_is_that_of_the_loss(model):
    split, tokens = noise(), caption_tokens(CLASSES, TEMPLATES[:1])
    loss, gradients = one_step(model, split, tokens)
    model.zero_grad()
    loader = Loader(split, "train", 8, CPU, training=True, images=False)
    batch = next(loader.epoch(1))
    image, text = model.encode_image(Images(split, 16, CPU)(batch)), model.encode_text(tokens[:, 0])
    expected = contrastive_loss(image, text, batch.target, model.logit_scale.exp())
    expected.backward()
    assert loss == pytest.approx(expected.item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8])
def test_micro_batches_give_the_gradients_of_the_whole_batch(model, micro_batch):
    split, tokens = noise(), caption_tokens(CLASSES)
    loss, gradients = one_step(model, split, tokens)
    found_loss, found = one_step(model, split, tokens, micro_batch=micro_batch)
    assert found_loss == pytest.approx(loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_micro_batches_reach_every_weight_under_autocast(model):
    """A weight that autocast had cast without a graph, and kept, would get no gradient."""
    split, tokens = noise(), caption_tokens(CLASSES)
    (_, whole), (_, parts) = (one_step(model, split, tokens, amp="bf16", micro_batch=size) for size in (None, 2))
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 0.1 * gradient.norm(), name


def test_a_compiled_image_encoder_gives_the_same(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    split, tokens = noise(), caption_tokens(CLASSES)
    loss, gradients = one_step(model, split, tokens)
    found_loss, found = one_step(model, split, tokens, compile="on")
    assert found_loss == pytest.approx(loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_captions_are_cut_without_effect(model):
    tokens = caption_tokens(CLASSES)
    assert tokens.shape[:2] == (len(CLASSES), len(TEMPLATES))
    assert tokens.shape[2] < 77
    full = clip.tokenize([template.format("maple tree") for template in TEMPLATES])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens[3]), model.encode_text(full))


def test_images_at_their_own_size_are_only_normalised():
    split = Split(torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6))
    loader = Loader(split, "test", 4, CPU, images=False)
    pixels = torch.cat([Images(split, 32, CPU)(batch) for batch in loader.epoch()])
    assert torch.equal(pixels, normalize(split.images, CLIP_NORMALIZATION))
    assert Images(split, 48, CPU)(next(loader.epoch())).shape == (4, 3, 48, 48)


def test_zero_shot_accuracy_is_that_of_clips_own_forward(model):
    model.eval()
    torch.manual_seed(1)
    split = Split(torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8), torch.randint(5, (40,)))
    tokens = caption_tokens(CLASSES, templates=TEMPLATES[:1])
    loader = Loader(split, "test", 16, CPU, images=False)
    found = zero_shot_accuracy(model, loader, Images(split, 16, CPU), tokens, options())
    with torch.no_grad():
        per_image, _ = model(normalize(split.images, CLIP_NORMALIZATION), tokens[:, 0])
    assert found == pytest.approx(100 * (per_image.argmax(dim=1) == split.targets).float().mean().item())


def test_class_embeddings_average_normalised_captions(model):
    weights = class_embeddings(model, caption_tokens(CLASSES))
    for name, weight in zip(CLASSES, weights, strict=True):
        with torch.no_grad():
            text = model.encode_text(clip.tokenize([template.format(name) for template in TEMPLATES]))
        mean = sum(t / t.norm() for t in text) / len(text)
        torch.testing.assert_close(weight, mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_learning_rate_rises_then_falls_to_nearly_zero():
    opt = options(learning_rate=0.4, warmup=0.25)
    rates = [learning_rate(step, 40, opt) for step in range(1, 41)]
    assert rates[:10] == pytest.approx([0.04 * step for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(1, 40, options(learning_rate=0.4, warmup=0)) == pytest.approx(0.4, rel=0.01)
    assert learning_rate(40, 40, options(learning_rate=0.4, warmup=1)) == pytest.approx(0.4)


def coloured() -> tuple[Split, Loader]:
    """Forty images of five flat colours."""
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0]], dtype=torch.uint8)
    targets = torch.arange(5).repeat(8)
    split = Split(colours[targets][:, :, None, None].expand(-1, -1, 16, 16).contiguous(), targets)
    return split, Loader(split, "train", 20, CPU, training=True, images=False)


def train(model: CLIP, epochs: int) -> tuple[list[dict], float]:
    """The epochs' results, and the zero-shot accuracy at the end."""
    split, loader = coloured()
    pixels, tokens, opt = Images(split, 16, CPU), caption_tokens(CLASSES), options(epochs=epochs)
    trained = train_clip(opt, model, pixels, tokens, loader)
    results = [trained.epoch(epoch, save=None) for epoch in range(1, epochs + 1)]
    test_loader = Loader(split, "test", 40, CPU, images=False)
    return results, zero_shot_accuracy(model, test_loader, pixels, tokens, opt)


def test_training_tells_colours_apart(model):
    results, accuracy = train(model, epochs=20)
    assert results[-1]["train_loss"] < 0.8 * results[0]["train_loss"]
    assert accuracy == 100


def test_logit_scale_is_clamped(model):
    with torch.no_grad():
        model.logit_scale.fill_(math.log(150))
    train(model, epochs=1)
    assert 0.98 * MAX_LOGIT_SCALE < model.logit_scale.exp() <= 1.0001 * MAX_LOGIT_SCALE


def test_the_rate_of_each_step_is_the_schedules(model):
    results, _ = train(model, epochs=2)
    rates = [learning_rate(step, 4, options()) for step in (2, 4)]
    assert [record["lr"] for record in results] == rates
