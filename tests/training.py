"""A training step of every method on tiny data, for the tests of what a step does and does not."""

from argparse import Namespace

import torch
from torch import Tensor, nn

from conftest import make_dataset
from dataset import Split
from dataset.loader import Loader
from dataset.splits import keep_labels
from distiller_zoo import METHODS
from helper import distributed
from helper.bank import EmbeddingBank
from helper.capture import CapturedStep
from helper.objective import Objective, describe_networks
from helper.optim import sgd
from helper.options import student_parser
from helper.step import Distillation, Step
from helper.student import reuse
from helper.teacher import CnnTeacher, EncoderTeacher
from helper.training import Training
from models import create_classifier, create_model, create_student
from models.heads import TeacNet

CPU = torch.device("cpu")


def has_loss(name: str, clip: bool) -> bool:
    method = METHODS[name]
    return not (clip and method.needs_maps) and (bool(method.with_teacher(clip)[1]) or method.build is None)


WITH_EITHER = [(name, clip) for name in METHODS for clip in (True, False) if has_loss(name, clip)]


def make_training(
    name: str, clip: bool, batch_size: int, num_train: int, lr: float = 0.0, labels: float = 1, recorder=None
) -> tuple[Step, list[list[Tensor | None]]]:
    """A step of a method, and a list that gets each step's gradients.

    All batch norm is as at a test: an affine map of each sample. A CLIP is a bank of two views of random embeddings.

    Args:
        clip: whether the teacher is one, or a CNN.
        labels: share of the images that have one.
        recorder: see ``CapturedStep``; None for a step that is not captured.
    """
    data = make_dataset(num_train=num_train)
    argv = ["--distill", name, "--model_s", "resnet8", "--feature_dim", "8", "--feat_dim", "8", "--nce_k", "20"]
    opt = student_parser().parse_args(argv)
    opt.device, opt.amp, opt.compile, opt.weight_decay = "cpu", "off", "off", 5e-4
    method = METHODS[name]
    build, feeds = method.with_teacher(clip)
    torch.manual_seed(0)
    joint = "joint_s" in feeds
    if clip:
        bank = EmbeddingBank(torch.randn(20 + 2 * num_train, 12).half(), num_train, 20, 2, CPU)
        teacher = EncoderTeacher(bank, TeacNet(12, 8, 5))
        student = create_student("resnet8", 8, 5)
    else:
        teacher = CnnTeacher(
            create_model("resnet14", 5), TeacNet(64, 8, 5) if joint else None, "off", "t" in method.preact
        )
        student = create_classifier("resnet8", 5, 8 if joint else None, "s" in method.preact)
    if method.reuses:
        student = reuse(student, teacher, 32, 2)
    criterion = build(opt, describe_networks(student, teacher, 32, data.train.targets)) if build else None
    if hasattr(criterion, "acquaint"):  # random embeddings, the same for every process
        criterion.acquaint(torch.randn(20, 12 if clip else 64), torch.arange(20) % 5, lambda: None)
    train = Split(data.train.images, keep_labels(data.train.targets, labels, data.classes))
    place = {"rank": distributed.rank(), "processes": distributed.count()}
    loader = Loader(
        train, "train", batch_size, CPU, training=True, teacher_views=2 if clip else 162, shared=not clip, **place
    )
    weights = [weight or 0.0 for weight in method.default_weights(clip)]
    objective = Objective(criterion, feeds, *weights, 4, clip, method.beta_warmup, relational=method.relational)
    seen = None if name == "none" else teacher
    losses = Distillation(
        student, seen, objective, loader, opt, trains_head=seen is not None and (clip or joint)
    ).eval()
    parameters = [p for p in losses.parameters() if p.requires_grad]
    optimizer = sgd(parameters, lr, opt)
    steps = []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append([None if p.grad is None else p.grad.clone() for p in parameters])
    )
    made = (losses, [optimizer], torch.amp.GradScaler("cpu", enabled=False), loader)
    return Step(*made) if recorder is None else CapturedStep(*made, recorder), steps


def train_epoch(epoch: int, step: Step, epochs: int, print_freq: int = 100) -> dict[str, float]:
    """An epoch of a step, at the learning rate and in the mode that it has; what it measured."""
    opt = Namespace(seed=0, device="cpu", epochs=epochs, print_freq=print_freq, save_steps=None)
    (optimizer,) = step.optimizers
    training = Training(opt, step, nn.Identity(), {}, rate=lambda *_: optimizer.param_groups[0]["lr"])
    record = training.epoch(epoch, save=None)
    return {name: value for name, value in record.items() if name not in ("epoch", "lr")}
