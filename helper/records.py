"""What a run records, options.json and metrics.jsonl: written by ``helper.run``, read by all that look at runs."""

import json
from dataclasses import dataclass
from pathlib import Path

from errors import InputError

# What may differ when a run is resumed: how long it goes on, where things are, what is printed. Data and
# weights are recognised by their hashes instead of their paths.
FREE = {
    "epochs",
    "data_dir",
    "max_bad_images",
    "clip_root",
    "save_dir",
    "clip_mode",
    "model",
    "path_t",
    "init_s",
    "print_freq",
    "save_steps",
    "save_seconds",
    "resume",
}


def best_record(history: list[dict]) -> dict | None:
    """The record of the best epoch, the first of equals: by val_acc with a hold-out set, else by test_acc.

    Where no accuracy is measured, for want of labels, the last that a test pass followed.
    """
    tested = [record for record in history if "test_acc" in record]
    measured = [record for record in tested if record["test_acc"] is not None]
    return max(measured, key=_score, default=tested[-1] if tested else None)


def _score(record: dict) -> float:
    return record.get("val_acc", record["test_acc"])


_CORRUPT = "{}: its options.json or metrics.jsonl is missing or corrupt"


@dataclass(frozen=True)
class StoredRun:
    """A finished run, as options.json and metrics.jsonl in its folder tell it; its weights need not be there.

    Attributes:
        folder: SAVE/student_model/NAME, or a copy of it.
        options: of options.json.
        history: the lines of metrics.jsonl.
    """

    folder: Path
    options: dict
    history: list[dict]

    def option(self, name: str) -> object:
        """An option's value, or None."""
        return self.options.get(name)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs and values of a metric, where it was measured."""
        measured = [record for record in self.history if record.get(name) is not None]
        return [record["epoch"] for record in measured], [record[name] for record in measured]


def read_run(folder: str | Path) -> StoredRun:
    """Read a finished run; where its resume.pth is still there, which has a checksum, the two files must agree with it.

    Raises:
        InputError: not the folder of a student's run, or of one that is not finished; or a file is damaged.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / "options.json").is_file():
        raise InputError(f"{folder} is not the folder of a run (SAVE/student_model/NAME); it has no options.json")
    try:
        options = json.loads((folder / "options.json").read_text())
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise InputError(_CORRUPT.format(folder)) from error
    if not isinstance(options, dict) or "distill" not in options:
        raise InputError(f"{folder} is not the folder of a run of train_student.py")
    named = {"model_s", "model_t"} <= options.keys() and isinstance(options.get("epochs"), int)
    if not named or not all(isinstance(record, dict) for record in history):
        raise InputError(_CORRUPT.format(folder))
    if len(history) < options["epochs"]:
        raise InputError(f"the run in {folder} is not finished: resume it, with the command that began it")
    if [record.get("epoch") for record in history] != list(range(1, len(history) + 1)):
        raise InputError(_CORRUPT.format(folder))
    _compare_with_resume(folder, options, history)
    return StoredRun(folder, options, history)


def _compare_with_resume(folder: Path, options: dict, history: list[dict]) -> None:
    if not (folder / "resume.pth").exists():
        return
    from . import checkpoint  # here, so that a table of runs without checkpoints needs no torch

    saved = checkpoint.load(folder / "resume.pth")
    kept = {name: value for name, value in saved.get("options", {}).items() if name not in FREE}
    for found, wanted in (({name: options.get(name) for name in kept}, kept), (history, saved.get("history"))):
        if json.dumps(found) != json.dumps(wanted):  # as JSON, in which a tuple is a list and nan equals itself
            raise InputError(
                f"{folder}: its options.json or metrics.jsonl does not agree with resume.pth: "
                "delete *_last.pth there and run its command again, which writes both anew"
            )
