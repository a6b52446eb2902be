"""A run's records, options.json and metrics.jsonl: ``helper.run`` writes them, all that look at runs read them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from errors import InputError
from models.names import parse_name

# Options that do not change a run's result: where things are, what is printed, what is saved. Data and weights are
# recognised by their hashes instead of their paths.
_PLACES = {
    "name",
    "data_dir",
    "data_list",
    "probe_dir",
    "max_bad_images",
    "exact_decode",
    "clip_root",
    "save_dir",
    "clip_mode",
    "model",
    "path_t",
    "init_s",
    "print_freq",
    "save_freq",
    "save_steps",
    "save_seconds",
    "log",
    "resume",
}

# Options that may change when a run is resumed: these, and how long it goes on.
FREE = {"epochs", "patience", *_PLACES}

# The key of options.json that holds the hash of the run's record.
HASH = "record_sha256"


def settings(options: dict) -> dict:
    """The options that decide a run's result, its epochs among them; see ``setting``."""
    return {name: setting(name, value) for name, value in options.items() if name not in {*_PLACES, HASH}}


def setting(name: str, value: object) -> object:
    """An option's value without what changes no result: 1.0 is 1, and files count by their hashes, not their paths.

    A file of Python counts by its name too.
    """
    if name == "model_s" and (network := parse_name(value)).library is not None:
        own = network.name.rpartition("/")[2] if network.library == "file" else network.name
        return str(network._replace(name=own, path=None if network.path is None else ""))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def record_hash(options: dict, history: list[dict]) -> str:
    """SHA-256 of a finished run's settings and of its metrics."""
    return hash_of([settings(options), history])


def hash_of(value: object) -> str:
    """SHA-256 of a value as JSON, in which a tuple is a list."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def best_record(history: list[dict]) -> dict | None:
    """The record of the best epoch, the first of equals: by val_acc with a hold-out set, else by test_acc.

    Without labels no accuracy is measured. The best epoch is then that of the lowest loss on the pictures that were
    held out, or of the most nearest neighbours that are the teacher's, where there is no such loss.
    """
    tested = [record for record in history if "test_acc" in record]
    return max(tested, key=_score, default=None)


def _score(record: dict) -> float:
    if record["test_acc"] is not None:
        return record.get("val_acc", record["test_acc"])
    return record["heldout_knn"] if record["heldout_loss"] is None else -record["heldout_loss"]


@dataclass(frozen=True)
class StoredRun:
    """A finished run, read from options.json and metrics.jsonl in its folder; its weights need not be there.

    Attributes:
        folder: SAVE/student_model/NAME, or a copy of it.
        options: the content of options.json.
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


def read_record(folder: str | Path) -> tuple[dict, list[dict]]:
    """The content of a finished run's options.json and metrics.jsonl.

    The hash in options.json is written when the run has ended, so that a killed run has none.

    Raises:
        InputError: the folder holds no run, or one that is not finished; or a file is damaged.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / "options.json").is_file():
        raise InputError(f"{folder} is not the folder of a run (SAVE/student_model/NAME); it has no options.json")
    try:
        options = json.loads((folder / "options.json").read_text())
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise _corrupt(folder) from error
    if not isinstance(options, dict):
        raise _corrupt(folder)
    if HASH not in options:
        raise InputError(f"the run in {folder} is not finished: resume it, with the command that began it")
    if options[HASH] != record_hash(options, history):
        raise _corrupt(folder)
    return options, history


def _corrupt(folder: Path) -> InputError:
    return InputError(
        f"{folder}: its options.json or metrics.jsonl is missing or corrupt: run its command again, which writes both"
    )


def read_run(folder: str | Path) -> StoredRun:
    """Read a finished run of train_student.py.

    Raises:
        InputError, OSError: see ``read_record``; or another script made the run.
    """
    options, history = read_record(folder)
    if "distill" not in options:
        raise InputError(f"{folder} is not the folder of a run of train_student.py")
    return StoredRun(Path(folder), options, history)
