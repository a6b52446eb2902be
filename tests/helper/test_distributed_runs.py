"""Runs of two and three processes on gloo: written once, resumed, refused alike, and ended together."""

import contextlib
import functools
import gc
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import children, torchrun
from torch.distributed import HashStore, Store

import dataset
import pretrain_clip
import train_student
import train_teacher
from conftest import make_dataset, snapshot
from dataset.loader import Loader
from helper import distributed, launch
from helper.run import Run
from helper.step import HeadTraining, Step
from helper.teacher import EncoderTeacher
from models.heads import TeacNet
from training import train_epoch

CPU = torch.device("cpu")


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
    dataset.DATASETS |= {"tiny": lambda data_dir: make_dataset(), "twenty": lambda data_dir: make_dataset(20 * 16)}
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
    files = {"options.json", "metrics.jsonl", "resnet8_best.pth", "resnet8_last.pth", "resume.pth", "lock", "views.png"}
    assert names == files
    assert json.loads((run_folder(runs) / "options.json").read_text())["processes"] == job.count
    assert [record["epoch"] for record in records(runs)] == [1, 2]
    assert len(list((runs / "student_tensorboards" / run_folder(runs).name).iterdir())) == 1


def test_the_bank_of_all_is_that_of_one(job, runs, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.DATASETS, "tiny", lambda data_dir: make_dataset())
    argv = ["--clip_mode", str(tiny_clip), "--teacher_views", "2", "--epochs", "1", "--max_steps", "1"]
    assert distil(*argv, "--save_dir", str(tmp_path)) == 0
    assert snapshot(tmp_path / "teacher_bank") == snapshot(runs / "teacher_bank")


def test_a_resumed_run_ends_bit_identical(job, runs, tiny_clip, tmp_path):
    argv = ["--clip_mode", str(tiny_clip), "--teacher_views", "2", "--save_dir", str(tmp_path), "--name", "run"]
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
    """It is stopped after the fourth of five steps of epoch 2; a fifth of the images is labelled."""
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


VIT = ("--vision_layers", "1", "--vision_width", "64", "--vision_patch", "16")
RESNET = ("--vision_layers", "1,1,1,1", "--vision_width", "8")


def pretrain(*argv: str, network: tuple[str, ...] = VIT) -> int:
    """Run pretrain_clip.py; its exit code."""
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
    tiny = [*network, "--text_layers", "1", "--dataset", "tiny", "--device", "cpu", "--amp", "off"]
    tiny += ["--batch_size", "16", "--micro_batch", "5"]
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
    assert pretrain("--epochs", "3", "--save_dir", other, "--name", folders[2].name) == 2


@pytest.mark.parametrize("batch_size", ["69", "67", "16"])
def test_no_process_contrasts_a_single_image(job, tmp_path, batch_size):
    """A ResNet's last maps are a pixel each; 70 images leave 1 or 3, and shares leave 1 beyond a micro-batch's 5."""
    argv = ["--batch_size", batch_size, "--epochs", "1", "--save_dir", str(tmp_path)]
    assert set(job(functools.partial(pretrain, network=RESNET), *argv)) == {0}


def teach(save_dir: str) -> int:
    """Run train_teacher.py for a CNN; its exit code."""
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
    # A last batch of two would leave it running statistics with which maps explode.
    data = ["--dataset", "tiny", "--device", "cpu", "--amp", "off", "--batch_size", "23"]
    train_teacher.main([*data, "--model", "resnet14", "--epochs", "1", "--save_dir", save_dir])
    return 0


@pytest.fixture(scope="module")
def cnn(job, tmp_path_factory) -> str:
    """The checkpoint of a CNN that all processes trained together."""
    folder = tmp_path_factory.mktemp("cnn")
    assert set(job(teach, str(folder))) == {0}
    (path,) = folder.glob("models/*/resnet14_last.pth")
    return str(path)


def reviewed(teacher: str, *argv: str) -> int:
    """Distil by reviewkd, which normalises pooled features; the exit code."""
    return distil("--distill", "reviewkd", "--path_t", teacher, "--epochs", "1", *argv)


@pytest.mark.parametrize("batch_size", ["69", "67", "3"])
def test_no_process_distils_a_single_image(job, cnn, tmp_path, batch_size):
    argv = ["--batch_size", batch_size, "--save_dir", str(tmp_path)]
    assert set(job(reviewed, cnn, *argv)) == {0}


@pytest.mark.parametrize("method", ["abound", "factor", "fsp"])
def test_a_cnn_and_first_stages_train_over_processes(job, cnn, method, tmp_path):
    """Last batches that leave a process without a sample included."""
    argv = ["--distill", method, "--path_t", cnn, "--init_epochs", "2", "--epochs", "1", "--batch_size", "17"]
    assert set(job(distil, *argv, "--learning_rate", "0.001", "--save_dir", str(tmp_path))) == {0}
    lines = (run_folder(tmp_path) / "init" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["init_train_loss"] for line in lines]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)


def head_epoch() -> dict[str, float]:
    torch.manual_seed(0)
    data, embeddings = make_dataset(), torch.randn(70, 12)
    teacher = EncoderTeacher(lambda split, index, view: embeddings[index], TeacNet(12, 8, 5))
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
    with pytest.raises(Joined), launch.processes():
        pass
    return stores[0]


def test_a_restarted_process_meets_no_address_of_an_earlier_start(monkeypatch):
    store = HashStore()
    first, again = (joined_store(monkeypatch, store, restarts) for restarts in (0, 1))
    first.set("address", "of one that is dead")
    assert first.check(["address"])
    assert not again.check(["address"])


def test_where_it_could_meet_one_is_refused(monkeypatch, capsys):
    """Each of many agents counts its own starts."""
    with pytest.raises(SystemExit) as stop:
        joined_store(monkeypatch, HashStore(), 0, machines=2)
    assert stop.value.code == 2
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


def distil_in_a_job(*argv: str) -> None:
    with launch.processes():
        assert distil(*argv) == 0


TWENTY_STEPS = ["--distill", "none", "--dataset", "twenty", "--epochs", "2", "--save_steps", "4", "--print_freq", "4"]


@pytest.mark.parametrize("job", [2], indirect=True)
def test_a_job_that_loses_a_process_goes_on_by_itself_and_ends_bit_identical(job, tmp_path):
    """Whatever --resume said at first; ``python -m tests.restarts`` does it at random moments."""
    assert set(job(distil, *TWENTY_STEPS, "--save_dir", str(tmp_path / "whole"))) == {0}
    argv = ("--resume", "none", *TWENTY_STEPS, "--save_dir", str(tmp_path / "other"))
    process, said, killed = torchrun(2, 1, distil_in_a_job, argv, tmp_path), tmp_path / "stdout", False
    while process.is_alive():
        if not killed and said.exists() and "\nEpoch 2 [8/" in said.read_text():
            os.kill(children(process.pid)[-1], signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    assert killed and process.exitcode == 0
    lines = said.read_text().splitlines()
    assert any(line.startswith("resuming") and "of epoch 2" in line for line in lines)
    assert records(tmp_path / "other") == records(tmp_path / "whole")
    found, expected = (torch.load(run_folder(tmp_path / save) / "resnet8_last.pth") for save in ("other", "whole"))
    assert all(torch.equal(value, expected["model"][name]) for name, value in found["model"].items())
