"""evaluate.py --embed: the embeddings of a folder's pictures, in a file."""

import csv
import os
import resource
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_refused, change_options

import evaluate
import evaluation.embed
from dataset.views import CLIP_NORMALIZATION, normalize
from evaluation import load_student
from evaluation.embed import pictures_below
from evaluation.embedding_files import open_table
from evaluation.student import open_student
from evaluation.teacher import open_teacher_network
from models import create_encoder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Nine pictures, one of them broken and one hidden, at several depths; and a name that is not UTF-8."""
    folder = tmp_path / "pictures"
    (folder / "b" / "c").mkdir(parents=True)
    names = ["z.png", "a.png", "b/2.png", "b/10.png", "b/c/x.jpg", "b.png", os.fsdecode(b"caf\xe9.png"), ".hidden.png"]
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (32, 40 + number, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.JPG").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    (folder / "b" / "round").symlink_to(folder)  # a folder that it lies in
    return folder


READABLE = ["a.png", "b/10.png", "b/2.png", "b/c/x.jpg", "b.png", os.fsdecode(b"caf\xe9.png"), "z.png"]


def embed(run: Path, *options) -> None:
    evaluate.main([str(run), "--device", "cpu", "--embed", *map(str, options)])


def read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(errors="surrogateescape", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", *(f"e{column}" for column in range(len(head) - 1))]
    return [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)


def test_every_picture_is_embedded_as_load_student_embeds_it(finished, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.embed, "_BATCH", 3)
    monkeypatch.setattr(evaluation.embed, "_NAMES", 2)
    net, transform, _ = load_student(finished["ega"])
    expected = [net.embed(transform(Image.open(pictures / name))[None])[0] for name in READABLE]
    embed(finished["ega"], pictures, "--out", tmp_path / "all.npz")
    said = capsys.readouterr()
    assert f"skipped {pictures / 'broken.JPG'}: not an image" in said.out and "notes.txt" not in said.out
    assert said.out.splitlines()[-1].startswith("wrote 7 embeddings of the student, of 8 numbers each, to ")
    assert "8/8" in said.err.split("\r")[-1]  # the progress bar
    with np.load(tmp_path / "all.npz") as found:  # without pickles
        assert found["paths"].tolist() == [str(pictures / name) for name in READABLE]
        assert found["embeddings"].dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(found["embeddings"]), torch.stack(expected), rtol=0, atol=1e-5)
        embed(finished["ega"], pictures, "--out", tmp_path / "all.csv")
        paths, numbers = read_csv(tmp_path / "all.csv")
        assert paths == found["paths"].tolist() and np.array_equal(numbers, found["embeddings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "all.npz", "pictures"]


def test_the_teacher_s_embeddings_are_those_of_its_run(finished, pictures, tmp_path, tiny_clip):
    embed(finished["ega"], pictures, "--teacher", "--out", tmp_path / "teacher.csv")
    _, numbers = read_csv(tmp_path / "teacher.csv")
    student = open_student(finished["ega"])
    _, head = open_teacher_network(student.run, student.state, 5)
    encoder = create_encoder(str(tiny_clip), ".")
    squares = [load_student(finished["ega"])[1](Image.open(pictures / name)) for name in READABLE]
    mean, std = (torch.tensor(x)[:, None, None] for x in student.normalization)
    pixels = ((torch.stack(squares) * std + mean) * 255).round().to(torch.uint8)
    with torch.no_grad():
        expected = head(encoder(normalize(pixels, CLIP_NORMALIZATION)))[0]
    np.testing.assert_allclose(numbers, expected.numpy(), rtol=0, atol=1e-5)


def test_large_jpegs_are_decoded_as_in_the_run(finished, tmp_path):
    folder, exact = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    shutil.copytree(finished["none"], exact)
    change_options(exact, exact_decode=True)
    noise = np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.jpg")
    net, transform, _ = load_student(exact)
    whole = net.embed(transform(Image.open(folder / "large.jpg"))[None]).detach().numpy()
    for run, decoded in ((exact, True), (finished["none"], False)):
        embed(run, folder, "--out", tmp_path / "out.csv", "--force")
        assert np.allclose(read_csv(tmp_path / "out.csv")[1], whole, rtol=0, atol=1e-4) == decoded


def test_a_table_of_pyarrow_s(tmp_path, monkeypatch):
    """pyarrow is not among the requirements: what it would be given is looked at."""
    written = []

    class Writer:
        def __init__(self, file, schema):
            self.file = file

        def write_table(self, table):
            written.append(table)

        def close(self):
            self.file.write(b"closed")

    pyarrow = types.ModuleType("pyarrow")
    pyarrow.array = pyarrow.table = lambda value: value
    pyarrow.FixedSizeListArray = types.SimpleNamespace(from_arrays=lambda flat, width: flat.reshape(-1, width))
    pyarrow.parquet = types.ModuleType("pyarrow.parquet")
    pyarrow.parquet.ParquetWriter = Writer
    table = type("Table", (dict,), {"schema": None})
    pyarrow.table = table
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", pyarrow.parquet)
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    with open_table(tmp_path / "x.parquet") as file:
        file.add(["a", "b"], rows[:2])
        file.add([os.fsdecode(b"caf\xe9"), "d"], rows[2:])
    (found,) = written
    assert found["path"] == ["a", "b", "caf\\xe9", "d"] and np.array_equal(found["embedding"], rows)
    assert (tmp_path / "x.parquet").read_bytes() == b"closed"


def test_memory_does_not_grow_with_the_number_of_pictures(finished, tmp_path, monkeypatch):
    """Pictures are made up as they are read: 500,000 rows of 64 numbers would take 128 MB."""
    count, width, batch = 500_000, 64, 4096
    monkeypatch.setattr(evaluation.embed, "_BATCH", batch)
    grown = []
    with open_table(tmp_path / "many.npz") as table:
        for start in range(0, count, batch):
            rows = np.full((batch, width), start, np.float32)
            table.add([f"pictures/{number:09d}.png" for number in range(start, start + batch)], rows)
            if start == 0:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024  # kB
    with np.load(tmp_path / "many.npz") as found:
        assert len(found["paths"]) == len(found["embeddings"]) >= count
        assert found["embeddings"][-1, 0] == start and found["paths"][-1] == f"pictures/{start + batch - 1:09d}.png"


def test_pictures_come_in_the_order_of_their_paths_whatever_is_held_in_memory(pictures, monkeypatch):
    everything = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".png", ".jpg"))
    everything = [path for path in everything if not path.name.startswith(".")]
    assert list(pictures_below(pictures)) == everything
    for held in (1, 2, 3):
        monkeypatch.setattr(evaluation.embed, "_NAMES", held)
        assert list(pictures_below(pictures)) == everything


def test_bad_input_ends_in_one_line_and_writes_nothing(finished, pictures, tmp_path, capsys, monkeypatch):
    run, out = finished["none"], tmp_path / "out.npz"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("mine")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(evaluation.embedding_files.importlib.util, "find_spec", lambda name: None)
    for words, options in (
        ("needs --out FILE", [pictures]),
        ("needs --out FILE", [pictures, "--out", tmp_path / "out.txt"]),
        ("is not a folder", [tmp_path / "nowhere", "--out", out]),
        ("holds no images", [tmp_path / "empty", "--out", out]),
        ("none of its images can be read", [tmp_path / "broken", "--out", out]),
        ("is no folder", [pictures, "--out", tmp_path / "nowhere" / "out.npz"]),
        ("use --force", [pictures, "--out", tmp_path / "there.csv"]),
        ("pyarrow, which is not installed", [pictures, "--out", tmp_path / "out.parquet"]),
        ("has no teacher", [pictures, "--teacher", "--out", out]),
        ("by one RUN", [pictures, "--out", out, "--zero_shot"]),
        ("two questions", [pictures, "--out", out, "--search", "a cat"]),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as stopped:
            embed(run, *options)
        assert stopped.value.code == 2
        assert_refused(capsys, 2, words)
        assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.csv").read_text() == "mine"
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--teacher"])
    assert_refused(capsys, 2, "--embed DIR")
    embed(run, pictures, "--out", tmp_path / "there.csv", "--force")
    assert len(read_csv(tmp_path / "there.csv")[0]) == 7
