"""What the campaign takes for a fault: ``python -m tests.campaign`` itself is not part of the tests."""

import json
import random
from pathlib import Path

import pytest
import torch
from campaign.faults import flipped
from campaign.jobs import Ended, result

from helper import checkpoint

LINE = "train_student.py: error: disk full\n"


@pytest.mark.parametrize(
    ("codes", "said", "fine"),
    [
        ([4], LINE, True),
        ([4], f"\rteacher's embeddings: 3/9\n{LINE}", True),
        ([4, 0], LINE, True),
        ([1], LINE, False),
        ([4], "", False),
        ([4], LINE + LINE, False),
        ([4], f"Traceback (most recent call last):\n{LINE}", False),
    ],
)
def test_only_one_line_and_the_right_code_is_an_end(codes, said, fine):
    assert Ended(codes, said, 1.0).in_one_line(0, 4) == fine


def leave(folder: Path, weight: float = 1.0, seconds: float = 1.0, accuracy: float = 50.0) -> Path:
    folder.mkdir()
    record = {"epoch": 1, "seconds": seconds, "test_acc": accuracy}
    checkpoint.save({"model": {"w": torch.tensor([weight])}, "options": {"save_dir": str(folder)}}, folder / "a.pth")
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_two_ends_are_equal_but_for_times_and_paths(tmp_path):
    one = result(leave(tmp_path / "one"))
    assert len(one) == 2
    assert one == result(leave(tmp_path / "two", seconds=2.0))
    assert one != result(leave(tmp_path / "other", weight=1.0 + 1e-7))
    assert one != result(leave(tmp_path / "third", accuracy=51.0))
    (tmp_path / "two" / "b.pth.1.tmp").touch()
    assert one != result(tmp_path / "two")


def test_a_flip_is_one_bit():
    content = bytes(range(100))
    for seed in range(20):
        damaged = flipped(content, random.Random(seed))
        different = [a ^ b for a, b in zip(content, damaged, strict=True) if a != b]
        assert [bin(value).count("1") for value in different] == [1]
