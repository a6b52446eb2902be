"""What a run left, for the tests."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helper.records import HASH, read_record, record_hash


def read_metrics(folder: Path, timed: bool = False) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = () if timed else ("seconds", "images_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    tb_folder = folder.parent.parent / "student_tensorboards" / folder.name
    events = EventAccumulator(str(tb_folder), purge_orphaned_data=False).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("best/")]  # written when the run ends
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_refused(capsys, code: int, *words: str):
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and lines[-1] == errors[0]
    for word in words:
        assert word in errors[0]


def change_options(folder: Path, **changes) -> None:
    """Change what a finished run recorded, as if it had been run so."""
    options, history = read_record(folder)
    options |= changes
    (folder / "options.json").write_text(json.dumps(options | {HASH: record_hash(options, history)}))
