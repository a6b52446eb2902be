"""What a training step may not do, so that a GPU can be given the next one while it is at this one."""

from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pretend_gpu import Graph, record, waits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_dataset
from dataset.loader import Loader
from distiller_zoo import METHODS
from errors import SpeedUpFailed
from helper.optim import build_optimizer
from helper.teacher import EncoderTeacher
from models.heads import TeacNet
from training import CPU, WITH_EITHER, make_training, train_epoch


class Watch(TorchDispatchMode):
    """Notes what waits."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if waits(name, args):
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "clip"), WITH_EITHER, ids=str)
def test_a_step_waits_for_nothing_unless_its_methods_row_says_so(name, clip):
    step, _ = make_training(name, clip, 8, 17)
    first, second, last = step.loader.draws(1)
    step(first, 1)
    with Watch() as watch:
        step(second, 1)
        step(last, 1)
    assert bool(watch.seen) == METHODS[name].waits


def test_nor_does_a_step_with_scaled_gradients():
    step, _ = make_training("ega", True, 8, 17)
    step.scaler = torch.amp.GradScaler("cpu")
    first, second, last = step.loader.draws(1)
    step(first, 1)
    with Watch() as watch:
        step(second, 1)
        step(last, 1)
    assert not watch.seen


def test_nor_does_a_step_with_images_that_have_no_label():
    step, _ = make_training("ega", True, 8, 17, labels=0.3)
    first, second, last = step.loader.draws(1)
    step(first, 1)
    with Watch() as watch:
        step(second, 1)
        step(last, 1)
    assert not watch.seen


def test_the_watch_notices():
    with Watch() as watch:
        x = torch.arange(4.0)
        x[x > 1] = 0
        torch.tensor([1.0])
        x.sum().item()
    assert watch.seen == {"index_put_", "lift_fresh", "_local_scalar_dense"}


def test_a_bank_that_stays_on_the_host_is_asked_by_numbers_that_are_there():
    asked = []

    class HostBank:
        lookup_device = torch.device("meta")  # any other than the batch's

        def __call__(self, split, index, view):
            asked.append((index, view))
            return torch.zeros(len(index), 12)

    loader = Loader(make_dataset().train, "train", 16, CPU, training=True, teacher_views=3)
    teacher = EncoderTeacher(HostBank(), TeacNet(12, 8, 5))
    for draw in loader.draws(1):
        batch = loader.batch(draw)
        teacher("train", batch)
        index, view = asked.pop()
        assert index is batch.host[0]
        assert view is batch.host[1]
        assert torch.equal(index, batch.index)
        assert torch.equal(view, batch.teacher_view)


class Tape:
    """Captures on a CPU, see ``Graph``; PyTorch's own checks of what may be captured are on."""

    def __init__(self):
        self.before = self.captures = self.replays = 0

    def run(self, function):
        self.before += 1
        function()

    def record(self, function):
        self.captures += 1
        graph = Graph()
        cuda = {"is_available": lambda: True, "is_current_stream_capturing": lambda: True}
        stream = SimpleNamespace(is_capturing=lambda: True)  # whom PyTorch 2.14's optimisers ask
        on_stream = mock.patch.object(torch.accelerator, "current_stream", return_value=stream)
        with mock.patch.multiple(torch.cuda, **cuda), on_stream, record(graph):
            function()

        def replay():
            self.replays += 1
            graph.replay()

        return replay


@pytest.mark.parametrize(
    ("name", "labels", "optimizer", "scaled"),
    [
        ("ega", 1, "sgd", False),
        ("crd", 1, "sgd", False),
        ("dkd", 1, "sgd", False),
        ("ega", 0.1, "sgd", False),
        ("ega", 1, "adamw", False),
        ("ega", 1, "sgd", True),
        ("ega", 1, "adamw", True),
    ],
)
def test_captured_steps_train_as_others_do(name, labels, optimizer, scaled):
    """Over four epochs of five full batches and a smaller one; the learning rate falls, dkd's weight grows.

    The rates are numbers of float32: a replay has no others.

    Scaled as with fp16, the first steps overflow, and the scale grows and falls on.
    """
    tape = Tape()
    results = []
    for capture in (None, tape):
        step, _ = make_training(name, True, 8, 43, lr=2**-7, labels=labels, recorder=capture)
        if optimizer == "adamw":
            opt = Namespace(optimizer=optimizer, learning_rate=2**-7, weight_decay=0.05)
            modules = [step.losses.student, step.losses.teacher.head, step.losses.criterion or nn.Identity()]
            step.optimizers = [build_optimizer(modules, opt)]
        if scaled:
            step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        step.losses.student.train()
        torch.manual_seed(1)
        records = []
        for epoch in range(1, 5):
            step.optimizers[0].param_groups[0]["lr"] = 2.0 ** -(6 + epoch)
            records.append(train_epoch(epoch, step, epochs=4, print_freq=2))
            records[-1].pop("images_per_second")
        results.append((records, [x.clone() for x in step.losses.state_dict().values()]))
    (records, weights), (again, weights_again) = results
    assert records == again
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
    # Three steps come before the capture; the last batches are never replayed.
    assert (tape.before, tape.captures, tape.replays) == (3, 1, 4 * 5 - 3)
    groups = step.optimizers[0].param_groups
    assert all(type(group["lr"]) is float and not group.get("capturable") for group in groups)


def test_a_step_that_cannot_be_captured_says_why():
    class Cannot(Tape):
        def record(self, function):
            try:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    step, _ = make_training("ega", True, 8, 43, lr=0.01, recorder=Cannot())
    with pytest.raises(SpeedUpFailed, match=r"captured .*\(CUDA error: operation not permitted when .* capturing\)"):
        train_epoch(1, step, epochs=1)
    assert step.losses.objective.captured_beta is None
    assert type(step.optimizers[0].param_groups[0]["lr"]) is float


def test_the_tape_keeps_the_numbers_that_it_recorded():
    """So that a step which should have been captured anew, and was not, is noticed."""
    x, factor = torch.ones(2), [3.0]
    replay = Tape().record(lambda: x.mul_(factor[0]))
    factor[0] = 5.0
    replay()
    replay()
    assert x.tolist() == [9, 9]
