"""The benchmarks at toy size: that they run, print their rows, and that their baseline computes what it should."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import agent, forked

from benchmarks import common, data, decode, ega_loss, encoders, epoch_end, growth, pipeline, startup
from benchmarks.release_recipe import TwoViews, corrcoef, direct_ega, release_loader, release_steps
from dataset.views import CLIP_NORMALIZATION, crop_flip, crop_resize_flip, normalize
from distiller_zoo import EGA
from models import create_student
from models.clip_teacher import ImageEncoder
from models.heads import TeacNet


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table, without its header."""
    blocks = (block.splitlines() for block in text.split("\n\n"))
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in block[2:]]
        for block in blocks
        if block and block[0].startswith("|")
    ]


def test_direct_formula_equals_ega():
    generator = torch.Generator().manual_seed(0)
    f_s, f_t = (torch.randn(9, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    f_s.requires_grad_()
    torch.testing.assert_close(corrcoef(f_s.detach()), torch.corrcoef(f_s.detach()))
    for weights in ((0.8, 0.24), (0.8, 0.3), (1.0, 0.0)):
        losses = [direct_ega(f_s, f_t, *weights), EGA(*weights)(f_s, f_t)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, f_s)[0] for loss in losses))


def test_release_views_are_among_the_162(tiny_dataset):
    views = TwoViews(tiny_dataset.train, 48)
    torch.manual_seed(0)
    image, image_t, target = views[3]
    every, one = torch.arange(162), tiny_dataset.train.images[3:4].expand(162, -1, -1, -1)
    students = normalize(crop_flip(one, every), CLIP_NORMALIZATION)
    teachers = normalize(crop_resize_flip(one, every, 48), CLIP_NORMALIZATION)
    assert (students - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5
    assert (teachers - image_t).abs().amax(dim=(1, 2, 3)).min() < 1e-5
    assert target == 3


def test_release_step_trains_student_and_head(tiny_dataset, tiny_clip):
    torch.manual_seed(0)
    encoder = ImageEncoder(str(tiny_clip), "")
    student, head = create_student("resnet8", 8, 5), TeacNet(encoder.dim, 8, 5)
    before = [weight.clone() for module in (student, head) for weight in module.parameters()]
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (student, head)]
    loader = release_loader(tiny_dataset.train, encoder.resolution, 32, workers=0)
    steps = list(release_steps(loader, encoder, student, head, *optimizers, torch.device("cpu")))
    assert len(steps) == 3  # 32 + 32 + 6: the last, smaller batch is kept
    after = [weight for module in (student, head) for weight in module.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_ega_loss_prints_a_row_per_batch_size(capsys):
    ega_loss.main(["--min_batch", "8", "--max_batch", "32", "--feature_dim", "16", "--seconds", "0.01"])
    text = capsys.readouterr().out
    assert common.machine() in text
    (rows,) = tables(text)
    assert [row[0] for row in rows] == ["8", "16", "32"]
    assert all(float(cell) > 0 for row in rows for cell in row)


def test_ega_loss_prints_errors(capsys):
    ega_loss.main(["--accuracy", "--min_batch", "2", "--max_batch", "32", "--feature_dim", "16"])
    (rows,) = tables(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["2", "4", "8", "16", "32"]
    assert all(0 <= float(cell) < 1e-4 for row in rows for cell in row[1:])


def test_the_exact_terms_are_the_direct_formulas(monkeypatch):
    monkeypatch.setattr(ega_loss, "_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    f_s, f_t = (torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = f_s.clone().requires_grad_()
    for weights, (value, gradient) in zip(((1.0, 0.0), (0.0, 1.0)), ega_loss.exact_terms(f_s, f_t), strict=True):
        loss = direct_ega(leaf, f_t, *weights)
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0])


def test_ega_loss_leaves_the_direct_formula_out_where_it_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(ega_loss, "available_memory", lambda device: 1000)
    ega_loss.main(["--min_batch", "8", "--max_batch", "8", "--feature_dim", "16", "--seconds", "0.01"])
    (((_, direct, ours, ratio, _, _),),) = tables(capsys.readouterr().out)
    assert direct == ratio == "-"
    assert float(ours) > 0


def test_peak_memory_counts_what_is_held_at_one_time():
    def two_of_three():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b + 1

    assert common.peak_memory(two_of_three) == pytest.approx(8000, abs=200)


def test_pipeline_prints_its_tables(capsys, tiny_dataset, tiny_clip):
    options = {
        "--clip_mode": tiny_clip,
        "--model_s": "resnet8",
        "--batch_size": 8,
        "--release_steps": 1,
        "--steps": 3,
        "--chunks": 1,
        "--workers": 1,
        "--teacher_views": 2,
        "--device": "cpu",
    }
    argv = [str(word) for pair in options.items() for word in pair]
    pipeline.main([*argv, "--dataset", "tiny"])
    text = capsys.readouterr().out
    assert text.startswith(common.machine())
    training, ((_, train, test, hours),), bank, parts, operations = tables(text)
    assert float(train) > 0
    assert float(test) > 0
    assert float(hours) == pytest.approx(240 * (float(train) + float(test)) / 3600, rel=0.1)
    assert len(training) == 3
    assert [row[:1] + row[2:3] for row in bank] == [
        ["1 view", "90"],
        ["2 views", "160"],
        ["16 views", "1140"],
        ["162 views", "11360"],
    ]
    shares = [float(share.rstrip("%")) for _, _, share in parts]
    assert sum(shares[:-2]) == pytest.approx(100, abs=0.5)
    assert sum(float(share.rstrip("%")) for _, _, share in operations) == pytest.approx(100, abs=1)
    assert any("conv" in name for name, _, _ in operations)
    names = {name for name, _, _ in parts}
    assert {"views", "teacher: look-up and head", "student: forward", "student: backward", "optimisers"} <= names


def growth_to(out: Path, env: dict[str, str], argv: list[str]) -> None:
    """benchmarks/growth.py in a process that is to have this environment and to print to a file."""
    if "RANK" not in os.environ:  # the agent gave its processes theirs
        os.environ |= env
    with open(out, "a") as sys.stdout:
        growth.main(argv)


@pytest.fixture
def growth_forks(monkeypatch, tmp_path) -> list[list[str]]:
    """The command lines that the benchmark starts, of this interpreter or torchrun: forked, with all imports done."""
    started = []

    def run(command: list[str], env: dict[str, str], **how) -> subprocess.CompletedProcess:
        started.append(command)
        at = command.index("benchmarks.growth")
        assert command[0] == sys.executable and command[at - 1] == "-m" and how["check"]
        before, out = command[1 : at - 1], tmp_path / f"out{len(started)}"
        call = (growth_to, out, env, command[at + 1 :])
        if before:
            assert before[:2] == ["-m", "torch.distributed.run"]
            call = (agent, before[2:], *call)
        assert forked(*call) == 0
        return subprocess.CompletedProcess(command, 0, out.read_text())

    monkeypatch.setattr(growth.subprocess, "run", run)
    # All of them share the random images of the first.
    monkeypatch.setattr(growth, "load_images", functools.cache(growth.load_images))
    return started


def test_growth_prints_its_tables(capsys, tiny_clip, tmp_path, growth_forks):
    options = {
        "--clip_mode": tiny_clip,
        "--model_s": "resnet8",
        "--dim": 16,
        "--seconds": 0.01,
        "--chunks": 1,
        "--device": "cpu",
        "--data_dir": tmp_path,  # where there is nothing
        "--max_bank": 2,
        "--steps": 1,
    }
    argv = [str(word) for pair in options.items() for word in pair]
    growth.main([*argv, "--batches", "4", "--views", "1", "162", "--processes", "2", "--job_batches", "8"])
    ((step,), banks, (job,), wire) = tables(capsys.readouterr().out)
    assert ["torch.distributed.run" in command for command in growth_forks] == [False, True]
    assert step[0] == "4"
    assert all(float(cell) > 0 for cell in step)
    assert [row[:2] for row in banks] == [["1", "60000"], ["162", "8110000"]]
    assert [row[-1] == "-" for row in banks] == [False, True]
    assert job[:3] == ["8", "2", "1"]
    assert float(job[6]) > 0
    # 8 samples are gathered: student and teacher in 256 dimensions, twice 7 / 8 of it on the wire of eight.
    assert [row[0] for row in wire] == ["8", "64", "1024"]
    assert float(wire[0][2]) == pytest.approx(1.75 * 2 * 8 * 256 * 4 / 2**20, rel=0.01)


def test_pipeline_goes_without_the_data(tmp_path):
    dataset, name = pipeline.load_images("cifar100", str(tmp_path))
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert "random" in name


@pytest.mark.parametrize("options", [["--teacher_views", "163"], ["--steps", "1000"], ["--clip_mode", "nowhere.pt"]])
def test_pipeline_refuses_bad_input(options, tiny_dataset, tiny_clip, capsys):
    few = ["--clip_mode", str(tiny_clip), "--batch_size", "8", "--steps", "1", "--release_steps", "1"]
    with pytest.raises(SystemExit) as exit_:
        pipeline.main(["--dataset", "tiny", *few, *options])
    assert exit_.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_encoders_prints_a_row_for_each(capsys):
    encoders.main(["--names", "timm:test_vit", "--resolution", "32", "--batch", "2", "--seconds", "0.01"])
    ((row,),) = tables(capsys.readouterr().out)
    assert row[:2] == ["timm:test_vit", "32"]
    assert float(row[3]) > 0 and float(row[6]) > 0


def test_data_prints_its_tables(capsys, tmp_path):
    argv = ["--size", "16", "100", "--batch", "4", "--dir", str(tmp_path)]
    data.main([*argv, "--images", "12", "--workers", "1", "--seconds", "0.01"])
    (rows,) = tables(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["16", "100"] and all(float(row[3]) > 0 for row in rows)
    data.main([*argv, "--mapped", "--gib", "0.001", "--steps", "1"])
    (rows,) = tables(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["16", "100"] and all(row[-1].endswith("%") for row in rows)
    assert not list(tmp_path.iterdir())


def test_decode_prints_a_row_for_each_size(capsys, tmp_path):
    data.write_photos(tmp_path, 3, (160, 128))
    decode.main([str(tmp_path), "--size", "16", "32", "33", "--turns", "1"])
    (rows,) = tables(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["16", "3"], ["32", "3"], ["33", "0"]]
    assert all(0 < float(row[5]) < 2 and int(row[7]) < 30 for row in rows[:2])


def test_startup_measures_a_command_alone(tmp_path):
    """A process this large must not count as the command's own memory."""
    (tmp_path / "large.py").write_text("x = bytearray(200 << 20)\n")
    (tmp_path / "small.py").write_text("")
    (_, large), (seconds, small) = (startup.measure([name], tmp_path) for name in ("large.py", "small.py"))
    assert 0 < small < 100
    assert 200 < large < 300
    assert seconds > 0


def test_startup_gives_ratios_first(tmp_path):
    folders = [tmp_path / name for name in ("now", "before")]
    for folder, size in zip(folders, (0, 200 << 20), strict=True):
        folder.mkdir()
        (folder / "allocate.py").write_text(f"x = bytearray({size})\n")
    name, _, ratio, *_, memory, memory_now = startup.row(
        startup.Start("it", ["allocate.py"], ["allocate.py"]), *folders, 1
    )
    assert name == "it"
    assert float(ratio) == pytest.approx(float(memory) / float(memory_now), rel=0.02)
    assert float(memory) > 200 > float(memory_now)


def test_an_epochs_end_is_measured_with_a_checkpoint_and_without(capsys, monkeypatch):
    monkeypatch.setattr(epoch_end, "_IMAGES", 20_000)
    epoch_end.main(["--model_s", "resnet8", "--epochs", "2"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["method", "ega", "crd"]
    for _, always, between, share in rows[1:]:
        assert float(share) == pytest.approx(float(between) / float(always), abs=0.01)
