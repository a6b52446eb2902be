import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from conftest import Code, snapshot
from helper import checkpoint

STATE = {
    "weights": OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.tensor(3)),
    "history": [{"epoch": 1, "acc": 0.1}, {"epoch": 2, "acc": float("nan")}],
    "options": {"name": "x", "list": [1, 2], "none": None, "flag": True, "pair": (1, 2)},
}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "state.pth"
    checkpoint.save(STATE, path)
    loaded = checkpoint.load(path)
    assert loaded["options"] == STATE["options"]
    assert repr(loaded["history"]) == repr(STATE["history"])
    assert list(loaded["weights"]) == ["a", "b"]
    assert all(torch.equal(loaded["weights"][key], value) for key, value in STATE["weights"].items())
    assert [p.name for p in tmp_path.iterdir()] == ["state.pth"]


def test_json_is_written_whole(tmp_path):
    checkpoint.write_json({"a": [1, None]}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    assert (tmp_path / "a.json").read_text().endswith("\n")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_the_old_content_survives_a_write_that_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "state.pth"
    checkpoint.save({"epoch": 1}, path)
    before = snapshot(tmp_path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"epoch": 2}, path)
    assert snapshot(tmp_path) == before


def test_the_old_content_stays_until_the_new_is_flushed_and_renamed(tmp_path, monkeypatch):
    """At each step up to the rename a kill would leave the old file; the new one is on the disk before it."""
    path, steps = tmp_path / "state.pth", []
    checkpoint.save({"epoch": 1}, path)
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        fsync(descriptor)
        folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        steps.append(("folder" if folder else "file", checkpoint.load(path)["epoch"]))

    def watched_replace(source, target):
        assert checkpoint.load(source) == {"epoch": 2}
        assert Path(source).parent == path.parent
        steps.append(("rename", checkpoint.load(path)["epoch"]))
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", watched_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", watched_replace)
    checkpoint.save({"epoch": 2}, path)
    assert steps == [("file", 1), ("rename", 1), ("folder", 2)]


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    trap, path = tmp_path / "ran", tmp_path / "state.pth"
    torch.save({"state": Code(trap)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        checkpoint.load(path)
    plain = pickle.dumps(Code(trap), protocol=2)
    path.write_bytes(plain)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        checkpoint.load(path)
    assert not trap.exists()
    pickle.loads(plain)
    assert trap.exists()  # the trap does work


@pytest.mark.parametrize("value", [torch.nn.Linear(1, 1), Path("a"), {"opt": type("Options", (), {})}])
def test_only_plain_data_is_loaded(tmp_path, value):
    path = tmp_path / "state.pth"
    try:
        torch.save(value, path)
    except (pickle.PicklingError, AttributeError):
        path.write_bytes(b"c__main__\nOptions\n.")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        checkpoint.load(path)


@pytest.mark.parametrize("value", [[1, 2], torch.ones(2), 3, "text"])
def test_what_is_no_dictionary_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "state.pth")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "state.pth")


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    checkpoint.save(STATE, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="or is corrupt"):
        checkpoint.load(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "content", [b"hello", b"\x00" * 64, b"PK\x03\x04" + bytes(60), b"\x80\x02}.", b"\xff\xfe\xfd", b"(lp0\n.", b"\x80"]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint of this project"):
        checkpoint.load(tmp_path / "other.pth")


def test_a_missing_file_is_no_corrupt_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pth")
