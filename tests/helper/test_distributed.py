"""Two and three processes on gloo: what they compute together is what one computes alone."""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip.model import CLIP
from torch import Tensor
from torch.distributed import HashStore, Store

import dataset
import pretrain_clip
import train_student
import train_teacher
from conftest import make_dataset, snapshot
from dataset.loader import Loader, deal
from distiller_zoo import ega_terms
from helper import distributed
from helper.contrastive import ContrastiveStep, Images, caption_tokens, contrastive_loss, zero_shot_accuracy
from helper.loops import HeadTraining, Step, train_epoch, validate
from helper.meters import Totals
from helper.run import Run
from helper.teacher import ClipTeacher
from helper.util import NonFiniteLoss
from models import create_student
from models.heads import TeacNet
from training import WITH_EITHER, make_training

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(pipe, variables: dict[str, str]) -> None:
    """A process of the job: calls what it is sent, until it is sent None."""
    os.environ |= variables
    torch.set_num_threads(1)
    with distributed.processes():
        while (call := pipe.recv()) is not None:
            function, args = call
            try:
                pipe.send((function(*args), None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))


class Job:
    """So many processes, started as torchrun starts them, that stay."""

    def __init__(self, count: int):
        self.count = count
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=serve, args=(theirs, variables), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable, *args) -> list:
        """What a function of this file gives on each process."""
        for pipe in self.pipes:
            pipe.send((function, args))
        found = [pipe.recv() for pipe in self.pipes]
        assert not any(error for _, error in found), "\n".join(str(error) for _, error in found)
        return [value for value, _ in found]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


@pytest.fixture(scope="module", params=[2, 3])
def job(request):
    job = Job(request.param)
    yield job
    job.end()


def is_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found.double() - expected).norm() <= tolerance * expected.norm())


# EGA's loss and the gathering of the others


def ega_of_shares(f_s: Tensor, f_t: Tensor, shares: tuple[int, ...]) -> list[Tensor]:
    """The two terms, and the gradients at this process's embeddings as DDP's mean over processes leaves them."""
    f_s, f_t = (distributed.own(f, shares).clone().requires_grad_() for f in (f_s, f_t))
    node, edge = ega_terms(f_s, f_t, shares)
    (0.8 * node + 0.24 * edge).backward()
    return [node.detach(), edge.detach(), f_s.grad / len(shares), f_t.grad / len(shares)]


@pytest.mark.parametrize("noise", [1.0, 0.01])
@pytest.mark.parametrize(("batch", "empty"), [(5, False), (2, False), (7, True), (16, False), (40, False), (41, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ega_is_that_of_all_samples_in_value_and_gradient(job, batch, empty, noise, dtype):
    """On both sides of B = D = 16, shares that differ and one that is empty included."""
    generator = torch.Generator().manual_seed(batch)
    f_t, other = torch.randn(2, batch, 16, generator=generator, dtype=torch.float64).to(dtype)
    f_s = f_t + noise * other
    shares = (*deal(batch, job.count - 1), 0) if empty else deal(batch, job.count)
    alone = [f.to(torch.float64, copy=True).requires_grad_() for f in (f_s, f_t)]
    node, edge = ega_terms(*alone)
    (0.8 * node + 0.24 * edge).backward()
    found = job(ega_of_shares, f_s, f_t, shares)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for values in found:
        assert is_close(values[0], node.detach(), tolerance)
        assert is_close(values[1], edge.detach(), tolerance)
    for leaf, gradients in zip(alone, ([values[i] for values in found] for i in (2, 3)), strict=True):
        assert [len(gradient) for gradient in gradients] == list(shares)
        assert is_close(torch.cat(gradients), leaf.grad, tolerance)


def refuse_shares(shares: tuple[int, ...]) -> str:
    with pytest.raises(ValueError, match="shares") as refused:
        ega_terms(torch.ones(3, 4), torch.ones(3, 4), shares)
    return str(refused.value)


def test_shares_that_do_not_fit_are_refused(job):
    assert all("3 samples" in said for said in job(refuse_shares, (4,) * job.count))
    job(refuse_shares, (3,) * (job.count + 1))


def gathered(x: Tensor, more: Tensor, index: Tensor, weight: Tensor, shares: tuple[int, ...]) -> list[Tensor]:
    mine = distributed.own(x, shares).clone().requires_grad_()
    whole, (first, second) = (
        distributed.gather(mine, shares),
        distributed.gather([distributed.own(more, shares)] * 2, shares),
    )
    (whole.square() * weight).sum().backward()
    assert torch.equal(first, second)
    return [whole.detach(), first, distributed.gather(distributed.own(index, shares), shares), mine.grad / len(shares)]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_gathering_gives_every_process_all_rows_and_its_own_the_gradient(job, batch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, batch, 3, generator=generator)
    more, index = torch.randn(batch, 2, 4, generator=generator), torch.arange(batch) + 2**60
    found = job(gathered, x, more, index, weight, deal(batch, job.count))
    for values in found:
        assert all(torch.equal(a, b) for a, b in zip(values[:3], (x, more, index), strict=True))
    torch.testing.assert_close(torch.cat([values[3] for values in found]), 2 * x * weight)


# The contrastive loss


def contrastive_of_shares(image, text, caption, scale, shares: tuple[int, ...]) -> list[Tensor]:
    """The loss, and the gradients as DDP's mean over processes leaves them."""
    texts = deal(len(text), len(shares))
    leaves = [distributed.own(image, shares), distributed.own(text, texts), scale]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = contrastive_loss(*leaves[:2], caption, leaves[2], shares)
    loss.backward()
    of_scale = distributed.total(leaves[2].grad)
    gradients = [leaves[0].grad, leaves[1].grad, of_scale]
    return [distributed.total(loss.detach()) / len(shares), *(gradient / len(shares) for gradient in gradients)]


@pytest.mark.parametrize("caption", [[0], [1, 0], [2, 0, 2, 1, 2, 0, 4, 3, 3], [0, 0, 0]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=str)
def test_the_contrastive_loss_is_that_of_all_samples(job, caption, dtype, tolerance):
    """A high scale, so that unshifted exponents would overflow; shares without images, and without texts."""
    generator, caption = torch.Generator().manual_seed(0), torch.tensor(caption)
    image, text = torch.randn(2, 9, 8, generator=generator, dtype=torch.float64)
    inputs = [image[: len(caption)], text[: int(caption.max()) + 1], torch.tensor(100.0, dtype=torch.float64)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = contrastive_loss(*leaves[:2], caption, leaves[2])
    loss.backward()
    image, text, scale = (x.to(dtype) for x in inputs)
    found = job(contrastive_of_shares, image, text, caption, scale, deal(len(caption), job.count))
    expected = [leaf.grad for leaf in leaves]
    # Where it nearly vanishes, a gradient is as exact as those that it is made of.
    size = torch.stack([gradient.norm() for gradient in expected]).norm() + 1e-3
    for values in found:
        assert values[0].item() == pytest.approx(loss.item(), rel=tolerance, abs=1e-3 * tolerance)
        assert (values[3] - expected[2]).abs() <= tolerance * size
    for i in (0, 1):
        gradient = torch.cat([values[i + 1] for values in found])
        assert (gradient.double() - expected[i]).norm() <= tolerance * size


def pretrain_epoch(micro_batch: int | None, batch_size: int, num_train: int) -> tuple[dict[str, float], list, float]:
    """An epoch's averages, every step's gradients and the zero-shot accuracy, of a CLIP without batch norm."""
    torch.manual_seed(0)
    data, model = make_dataset(num_train=num_train), CLIP(32, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    place = {"images": False, "rank": distributed.rank(), "processes": distributed.count()}
    loader = Loader(data.train, "train", batch_size, CPU, training=True, **place)
    optimizer, steps = torch.optim.SGD(model.parameters(), 0.0), []
    optimizer.register_step_pre_hook(lambda *_: steps.append([p.grad.clone() for p in model.parameters()]))
    opt = Namespace(device="cpu", amp="off", compile="off", micro_batch=micro_batch)
    scaler, tokens = torch.amp.GradScaler("cpu", enabled=False), caption_tokens(data.classes)
    step = ContrastiveStep(model, Images(data.train, 32, CPU), tokens, optimizer, scaler, loader, opt)
    torch.manual_seed(1)
    record = train_epoch(1, step, epochs=1, print_freq=100)
    record.pop("images_per_second")
    accuracy = zero_shot_accuracy(
        model, Loader(data.test, "test", 6, CPU, **place), Images(data.test, 32, CPU), tokens, opt
    )
    return record, steps, accuracy


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3])
def test_contrastive_training_is_that_of_one_process(job, micro_batch):
    """Batches of 8, 8 and 1: shares that differ, and empty ones; of these all or a part in one pass."""
    expected, gradients, accuracy = pretrain_epoch(None, 8, 17)
    for record, found, found_accuracy in job(pretrain_epoch, micro_batch, 8, 17):
        assert record == pytest.approx(expected, rel=1e-5)
        assert found_accuracy == accuracy
        assert len(found) == len(gradients) == 3
        for mine, theirs in zip(found, gradients, strict=True):
            size = torch.stack([gradient.norm() for gradient in theirs]).norm()
            for a, b in zip(mine, theirs, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6 * size


def of_different_losses(x: Tensor, weights: list[Tensor], shares: tuple[int, ...]) -> Tensor:
    mine = distributed.own(x, shares).clone().requires_grad_()
    (distributed.gather(mine, shares, alike=False) * weights[distributed.rank()]).sum().backward()
    return mine.grad


def test_gathering_adds_up_the_gradients_of_different_losses(job):
    x, *weights = torch.randn(1 + job.count, 7, 3, generator=torch.Generator().manual_seed(0))
    found = job(of_different_losses, x, weights, deal(7, job.count))
    torch.testing.assert_close(torch.cat(found), sum(weights))


# Training


def train(name: str, clip: bool, batch_size: int, num_train: int, labels: float = 1) -> tuple[dict[str, float], list]:
    """An epoch's averages and every step's gradients."""
    torch.manual_seed(0)
    step, gradients = make_training(name, clip, batch_size, num_train, labels=labels)
    torch.manual_seed(1)
    record = train_epoch(1, step, epochs=1, print_freq=100)
    record.pop("images_per_second")
    return record, gradients


@pytest.mark.parametrize(("name", "clip"), WITH_EITHER, ids=str)
def test_every_weights_gradient_is_that_of_one_process(job, name, clip):
    """Batches of 8, 8 and 1: shares that differ, and empty ones."""
    expected, gradients = train(name, clip, 8, 17)
    for record, found in job(train, name, clip, 8, 17):
        assert record == pytest.approx(expected, rel=1e-5)
        assert len(found) == len(gradients) == 3
        for mine, theirs in zip(found, gradients, strict=True):
            assert [gradient is None for gradient in mine] == [gradient is None for gradient in theirs]
            mine, theirs = ([gradient for gradient in step if gradient is not None] for step in (mine, theirs))
            size = torch.stack([gradient.norm() for gradient in theirs]).norm()
            for a, b in zip(mine, theirs, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6 * size


@pytest.mark.parametrize(("name", "clip"), [("ega", True), ("kd", True), ("ega", False), ("attention", False)])
def test_few_labels_give_the_gradient_of_one_process(job, name, clip):
    """Five labels in batches of 6, 6, 6 and 3: shares without one, and more of them on one process than on another."""
    expected, gradients = train(name, clip, 6, 21, 0.25)
    assert {"loss_cls", "train_acc"} <= expected.keys()
    for record, found in job(train, name, clip, 6, 21, 0.25):
        assert record == pytest.approx(expected, rel=1e-5)
        for mine, theirs in zip(found, gradients, strict=True):
            mine, theirs = ([gradient for gradient in step if gradient is not None] for step in (mine, theirs))
            size = torch.stack([gradient.norm() for gradient in theirs]).norm()
            for a, b in zip(mine, theirs, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6 * size


def test_ega_beyond_its_dimension_is_that_of_one_process(job):
    """Batches of 20 samples and one of 5, in 8 dimensions."""
    expected, gradients = train("ega", True, 20, 25)
    for record, found in job(train, "ega", True, 20, 25):
        assert record == pytest.approx(expected, rel=1e-5)
        for mine, theirs in zip(found, gradients, strict=True):
            assert all(is_close(a, b.double()) for a, b in zip(mine, theirs, strict=True))


def whole_test() -> dict[str, float]:
    torch.manual_seed(0)
    data = make_dataset()
    student, embeddings = create_student("resnet8", 8, 5), torch.randn(20, 12)
    teacher = ClipTeacher(lambda split, index, view: embeddings[index], TeacNet(12, 8, 5))
    rank, processes = distributed.rank(), distributed.count()
    loader = Loader(data.test, "test", 6, CPU, rank=rank, processes=processes)
    return validate(loader, student, teacher, Namespace(device="cpu", amp="off"))


def test_the_test_pass_sees_every_sample_once(job):
    expected = whole_test()
    assert all(found == pytest.approx(expected, rel=1e-6) for found in job(whole_test))


def not_finite_on_the_last(step: int) -> str:
    """A loss that is not finite on one process alone."""
    totals = Totals()
    for number in range(1, 6):
        bad = number >= step and distributed.rank() == distributed.count() - 1
        totals.add({"loss_cls": torch.tensor(1.0), "loss_edge": torch.tensor(float("nan") if bad else 1.0)}, {}, 2)
    with pytest.raises(NonFiniteLoss) as raised:
        totals.averages("Epoch 1")
    return str(raised.value)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(job):
    assert all("loss_edge is not finite at step 3 of epoch 1" in said for said in job(not_finite_on_the_last, 3))


# Runs


BASE = [
    "--dataset",
    "tiny",
    "--device",
    "cpu",
    "--amp",
    "off",
    "--batch_size",
    "16",
    "--model_s",
    "resnet8",
    "--feature_dim",
    "8",
]


def distil(*argv: str) -> int:
    """Run train_student.py; its exit code."""
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
    try:
        train_student.main([*BASE, *argv])
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.fixture(scope="module")
def runs(job, tiny_clip, tmp_path_factory) -> Path:
    """SAVE with a run of EGA of two epochs by all processes together, from a bank of two views."""
    folder = tmp_path_factory.mktemp("runs")
    argv = ["--clip_mode", str(tiny_clip), "--teacher_views", "2", "--epochs", "2", "--save_dir"]
    assert set(job(distil, *argv, str(folder))) == {0}
    return folder


def run_folder(save_dir: Path) -> Path:
    (folder,) = (save_dir / "student_model").iterdir()
    return folder


def records(save_dir: Path) -> list[dict]:
    lines = (run_folder(save_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")} for line in lines]


def test_a_run_is_written_once(job, runs):
    names = {path.name for path in run_folder(runs).iterdir()}
    files = {"options.json", "metrics.jsonl", "resnet8_best.pth", "resnet8_last.pth", "resume.pth", "lock"}
    assert names == files
    assert json.loads((run_folder(runs) / "options.json").read_text())["processes"] == job.count
    assert [record["epoch"] for record in records(runs)] == [1, 2]
    assert len(list((runs / "student_tensorboards" / run_folder(runs).name).iterdir())) == 1


def test_the_bank_of_all_is_that_of_one(job, runs, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "tiny", lambda data_dir: make_dataset())
    argv = ["--clip_mode", str(tiny_clip), "--teacher_views", "2", "--epochs", "1", "--save_dir", str(tmp_path)]
    assert distil(*argv) == 0
    assert snapshot(tmp_path / "teacher_bank") == snapshot(runs / "teacher_bank")


def test_a_resumed_run_ends_bit_identical(job, runs, tiny_clip, tmp_path):
    argv = ["--clip_mode", str(tiny_clip), "--teacher_views", "2", "--save_dir", str(tmp_path)]
    assert set(job(distil, *argv, "--epochs", "1")) == {0}
    assert set(job(distil, *argv, "--epochs", "2")) == {0}
    assert records(tmp_path) == records(runs)
    found, expected = (torch.load(run_folder(save) / "resnet8_last.pth") for save in (tmp_path, runs))
    for part in ("model", "layer", "teacher_layer"):
        assert all(torch.equal(value, expected[part][name]) for name, value in found[part].items())
    # A finished run prints its result; another number of processes is another run.
    assert set(job(distil, *argv, "--epochs", "2")) == {0}
    assert distil(*argv, "--epochs", "3") == 2


def interrupted(*argv: str) -> str:
    """Run train_student.py until the first process has saved the inside of an epoch for the third time."""
    saved, collect = [], distributed.collect

    def collecting(value: object) -> list:
        if isinstance(value, dict) and "log" in value:
            saved.append(value)
        if len(saved) == 4:  # all processes at once, as when a job is ended
            raise KeyboardInterrupt
        return collect(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "collect", collecting)
        with pytest.raises(KeyboardInterrupt):
            distil(*argv)
    gc.collect()  # the run, which holds its folder's lock
    return "interrupted"


@pytest.mark.parametrize("method", ["ega", "crd"])
def test_a_run_that_is_interrupted_inside_an_epoch_ends_bit_identical(job, method, tiny_clip, tmp_path):
    """Of five steps an epoch, after the fourth of the second; a fifth of the images is labelled."""
    argv = ["--distill", method, "--clip_mode", str(tiny_clip), "--epochs", "2", "--save_steps", "2", "--labels", "0.2"]
    argv += ["--feat_dim", "8", "--nce_k", "20", "--save_dir"]
    assert set(job(distil, *argv, str(tmp_path / "whole"))) == {0}
    assert set(job(interrupted, *argv, str(tmp_path / "other"))) == {"interrupted"}
    assert len(records(tmp_path / "other")) == 1
    assert torch.load(run_folder(tmp_path / "other") / "resume.pth")["steps"] == 2
    assert set(job(distil, *argv, str(tmp_path / "other"))) == {0}
    assert records(tmp_path / "other") == records(tmp_path / "whole")
    found, expected = (torch.load(run_folder(tmp_path / save) / "resnet8_last.pth") for save in ("other", "whole"))
    for part in ("model", "layer", "teacher_layer"):
        assert all(torch.equal(value, expected[part][name]) for name, value in found[part].items())


def everyones() -> list[int]:
    return distributed.collect(distributed.rank())


def test_collecting_gives_every_process_all_values(job):
    assert job(everyones) == [list(range(job.count))] * job.count


def refused() -> str:
    """What a wrong option prints."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert distil("--no_such_option") == 2
    return said.getvalue()


def test_a_wrong_option_is_told_once(job, monkeypatch):
    first, *others = job(refused)
    assert first.count("\n") == 1
    assert set(others) == {""}
    monkeypatch.setenv("RANK", "1")  # another launcher's, of a job that torchrun did not start
    assert refused() == first


def test_fewer_samples_than_processes_are_refused(job, tmp_path):
    argv = ["--distill", "none", "--batch_size", str(job.count - 1), "--save_dir", str(tmp_path)]
    assert set(job(distil, *argv)) == {2}


def test_batch_norm_over_all_processes_needs_cuda(job, tmp_path):
    assert set(job(distil, "--distill", "none", "--sync_bn", "--save_dir", str(tmp_path))) == {2}


def pretrain(*argv: str) -> int:
    """Run pretrain_clip.py; its exit code."""
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
    tiny = ["--vision_layers", "1", "--vision_width", "64", "--vision_patch", "16", "--text_layers", "1"]
    tiny += ["--dataset", "tiny", "--device", "cpu", "--amp", "off", "--batch_size", "16", "--micro_batch", "5"]
    try:
        pretrain_clip.main([*tiny, "--embed_dim", "16", "--print_freq", "1", *argv])
    except SystemExit as exit_:
        return exit_.code
    return 0


def stopped_in_the_second_epoch(*argv: str) -> str:
    """Run pretrain_clip.py until its second epoch is about to be saved."""
    end_epoch = Run.end_epoch

    def ending(run: Run, record: dict, *args) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt
        end_epoch(run, record, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_epoch", ending)
        with pytest.raises(KeyboardInterrupt):
            pretrain(*argv)
    gc.collect()  # the run, which holds its folder's lock
    return "stopped"


def test_pretraining_by_all_resumes_and_gives_the_clip_of_one(job, tmp_path):
    one, all_, other = (str(tmp_path / name) for name in ("one", "all", "other"))
    assert pretrain("--epochs", "2", "--save_dir", one) == 0
    assert set(job(pretrain, "--epochs", "2", "--save_dir", all_)) == {0}
    assert set(job(stopped_in_the_second_epoch, "--epochs", "2", "--save_dir", other)) == {"stopped"}
    for _ in range(2):  # to the end, and once more, when it is finished
        assert set(job(pretrain, "--epochs", "2", "--save_dir", other)) == {0}
    folders = [next((Path(save_dir) / "clip").iterdir()) for save_dir in (one, all_, other)]
    alone, together, resumed = (torch.load(folder / "clip.pt") for folder in folders)
    assert all(torch.equal(value, resumed[name]) for name, value in together.items())
    for name, value in alone.items():
        torch.testing.assert_close(together[name].float(), value.float(), atol=2e-3, rtol=2e-3, msg=name)
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    for mine, theirs in zip(lines[1], lines[0], strict=True):
        for name in ("epoch", "lr", "train_loss", "logit_scale"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    # Another number of processes is another run.
    assert pretrain("--epochs", "3", "--save_dir", other) == 2


def test_a_single_image_for_batch_norm_is_refused(job, tmp_path):
    """Batches of 69 and 1: a ResNet's last maps are of a pixel."""
    resnet = ["--vision_layers", "1,1,1,1", "--vision_width", "8", "--text_layers", "1", "--dataset", "tiny"]
    argv = [*resnet, "--device", "cpu", "--batch_size", "69", "--save_dir", str(tmp_path)]
    assert set(job(pretrain_resnet, *argv)) == {2}


def pretrain_resnet(*argv: str) -> int:
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
    with pytest.raises(SystemExit) as stop:
        pretrain_clip.main([*argv])
    return stop.value.code


def teach(save_dir: str) -> int:
    """Run train_teacher.py for a CNN; its exit code."""
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
    data = ["--dataset", "tiny", "--device", "cpu", "--amp", "off", "--batch_size", "23"]
    train_teacher.main([*data, "--model", "resnet14", "--epochs", "1", "--save_dir", save_dir])
    return 0


@pytest.mark.parametrize("method", ["abound", "factor", "fsp"])
def test_a_cnn_and_first_stages_train_over_processes(job, method, tmp_path):
    """Last batches of one sample included."""
    assert set(job(teach, str(tmp_path))) == {0}
    (teacher,) = (tmp_path / "models").glob("*/resnet14_last.pth")
    argv = ["--distill", method, "--path_t", str(teacher), "--init_epochs", "2", "--epochs", "1", "--batch_size", "23"]
    assert set(job(distil, *argv, "--learning_rate", "0.001", "--save_dir", str(tmp_path))) == {0}
    lines = (run_folder(tmp_path) / "init" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["init_train_loss"] for line in lines]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)


def head_epoch() -> dict[str, float]:
    torch.manual_seed(0)
    data, embeddings = make_dataset(), torch.randn(70, 12)
    teacher = ClipTeacher(lambda split, index, view: embeddings[index], TeacNet(12, 8, 5))
    rank, processes = distributed.rank(), distributed.count()
    loader = Loader(data.train, "train", 23, CPU, training=True, images=False, rank=rank, processes=processes)
    optimizer = torch.optim.SGD(teacher.head.parameters(), 0.5, momentum=0.9)
    step = Step(HeadTraining(teacher, loader), [optimizer], torch.amp.GradScaler("cpu", enabled=False), loader)
    record = [train_epoch(epoch, step, 3, print_freq=100) for epoch in (1, 2, 3)][-1]
    return {name: record[name] for name in ("train_loss", "train_acc")}


def test_a_teachers_head_learns_as_on_one_process(job):
    """Batches of 23 and one of a single sample."""
    expected = head_epoch()
    assert all(found == pytest.approx(expected, rel=1e-4) for found in job(head_epoch))


# What every process has to agree on


def refusals(function: Callable, *args) -> str:
    """How a function ends: with what it raises, or with an exit code."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    except SystemExit as exit_:
        return f"exit {exit_.code}"
    return "fine"


def given(names: list[str]) -> str:
    """Each process is given one of these names for its data, the others the last."""
    name = names[min(distributed.rank(), len(names) - 1)]
    return refusals(distributed.check_alike, {"batch_size": 64, "dataset_sha256": name})


def test_what_is_not_alike_is_refused(job):
    assert set(job(given, ["abc"])) == {"fine"}
    first, *others = job(given, ["abc", "def"])
    assert first.startswith("process 1 has dataset_sha256 def, the first one abc")
    assert set(others) == {"exit 2"}


def shared(folder: Path, own_folder: bool) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_SEEN_WITHIN", 0.3)
        place = folder / str(distributed.rank()) if own_folder else folder
        place.mkdir(exist_ok=True)
        return refusals(distributed.check_shared, place, place / "lock")


def test_a_folder_that_only_the_first_machine_sees_is_refused(job, tmp_path):
    (tmp_path / "shared-0.tmp").touch()  # by a job that was killed in the middle of this
    assert set(job(shared, tmp_path, False)) == {"fine"}
    first, *others = job(shared, tmp_path, True)
    assert first.startswith("process 1 (on ")
    assert f"{tmp_path / '0'}: it has to be on storage that all machines share" in first
    assert set(others) == {"exit 2"}
    assert not list(tmp_path.rglob("*.tmp"))


def fails_in_first(error: type[Exception]) -> str:
    def fail() -> None:
        raise error("only here")

    return refusals(distributed.in_first, fail)


def test_where_the_first_fails_all_end(job):
    first, *others = job(fails_in_first, ValueError)
    assert first == "only here"
    assert set(others) == {"exit 2"}


@pytest.mark.parametrize("what", ["run", "bank"])
def test_a_run_is_refused_where_only_one_process_sees_its_files(job, what, tiny_clip, tmp_path):
    if what == "bank":
        for name in ("student_model", "student_tensorboards"):
            (tmp_path / "shared" / name).mkdir(parents=True)
    assert set(job(distil_apart, str(tiny_clip), tmp_path)) == {2}
    assert not list(tmp_path.rglob("embeddings.fp16"))
    assert not list(tmp_path.rglob("resume.pth"))


def distil_apart(clip: str, tmp_path: Path) -> int:
    """Each process with a SAVE of its own, in which what is in tmp_path/shared is everybody's."""
    save = tmp_path / str(distributed.rank())
    save.mkdir()
    for path in (tmp_path / "shared").glob("*"):
        (save / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_SEEN_WITHIN", 0.3)
        code = distil("--clip_mode", clip, "--teacher_views", "1", "--epochs", "1", "--save_dir", str(save))
    gc.collect()
    return code


# A process that dies


class Joined(Exception):
    """In the place of a process group."""


def joined_store(monkeypatch, store: Store, restarts: int, machines: int = 1) -> Store:
    """The store with which a process joins the others, as torchrun starts it for the first time or again."""
    facts = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    facts |= {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    for name, value in (facts | {"GROUP_WORLD_SIZE": str(machines)}).items():
        monkeypatch.setenv(name, value)
    stores = []

    def join(**options) -> None:
        stores.append(options["store"])
        raise Joined

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(store, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    with pytest.raises(Joined), distributed.processes():
        pass
    return stores[0]


def test_a_restarted_process_meets_no_address_of_an_earlier_start(monkeypatch):
    store = HashStore()
    first, again = (joined_store(monkeypatch, store, restarts) for restarts in (0, 1))
    first.set("address", "of one that is dead")
    assert first.check(["address"])
    assert not again.check(["address"])


def test_where_it_could_meet_one_is_refused(monkeypatch, capsys):
    """Of many agents, each counts its own starts."""
    with pytest.raises(SystemExit) as stop:
        joined_store(monkeypatch, HashStore(), 0, machines=2)
    assert stop.value.code == 2
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


def children(parent: int) -> list[int]:
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(word) for word in said.stdout.split()]


SHAPES = ["--distill", "none", "--dataset", "shapes", "--model_s", "resnet8", "--epochs", "2", "--batch_size", "16"]
SHAPES += [
    "--amp",
    "off",
    "--feature_dim",
    "8",
    "--max_steps",
    "20",
    "--save_steps",
    "4",
    "--print_freq",
    "4",
    "--device",
    "cpu",
    "--save_dir",
]


@pytest.mark.parametrize("job", [2], indirect=True)
def test_a_job_that_loses_a_process_goes_on_by_itself_and_ends_bit_identical(job, tmp_path):
    """Whatever --resume said at first; ``python -m tests.restarts`` does it at random moments."""
    assert set(job(distil, *SHAPES, str(tmp_path / "whole"))) == {0}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "1", "train_student.py", "--resume", "none", *SHAPES, str(tmp_path / "other")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Epoch 2 [8/") and sum("Epoch 2 [8/" in line for line in lines) == 1:
                os.kill(children(process.pid)[-1], 9)
        assert process.wait(timeout=60) == 0
    assert any(line.startswith("resuming") and "of epoch 2" in line for line in lines)
    assert records(tmp_path / "other") == records(tmp_path / "whole")
    found, expected = (torch.load(run_folder(tmp_path / save) / "resnet8_last.pth") for save in ("other", "whole"))
    assert all(torch.equal(value, expected["model"][name]) for name, value in found["model"].items())
