"""One run's folder: options, records, checkpoints; how it resumes and when it is finished."""

import contextlib
import math
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from errors import InputError

from . import checkpoint, distributed
from .exits import release_at_end, resumes, unbroken, without, write_at_end
from .logger import Logger
from .records import FREE, HASH, best_record, read_record, record_hash, setting


class Run:
    """A run of a number of epochs, which can be killed at any moment and resumed.

    A checkpoint is everything that the run goes on from, in one file, ``resume.pth``. It is written after the first
    epoch, after the last, and after each that ends ``save_seconds`` or more after the checkpoint before. In between the
    newest state is kept in memory, and written if the script ends early, see ``helper.exits``. A killed run goes on
    from its last checkpoint; later lines of the logs are dropped. The first process writes, all processes read.

    Attributes:
        folder: the folder of its files.
        identity: as given.
        recorded: the options of the resumed run; None for a new one.
        history: a record for every finished epoch.
        state: the state that the last ``end_epoch`` or ``save_inside`` saved, if the run was resumed; else None.
        steps: steps of the first epoch that are done, if the run was resumed inside it; else 0.

    Args:
        opt: the parsed options; ``save_dir``, ``resume``, ``epochs``, ``patience``, ``save_seconds`` and ``log`` count.
            Options that are no longer ``auto`` or ``all`` are compared with those of the run that is resumed.
        identity: the hashes of data and weights, by name; they are compared and recorded too.
        kind: the folder in SAVE of such runs: 'student_model', say.
        tb_kind: the folder in SAVE of their TensorBoard events.
        name: the run's name.
        stem: begins the names of the files of the best model, {stem}_best.pth, and of the last, {stem}_last.pth.

    Raises:
        InputError: the folder holds a run that is in use, has other options or is not to be resumed; or ``--resume``
            names no run.
        OSError: the folder cannot be written.
    """

    def __init__(self, opt, identity: dict[str, str], kind: str, tb_kind: str, name: str, stem: str):
        given = {key: value for key, value in vars(opt).items() if key not in FREE and value not in ("auto", "all")}
        given |= identity
        distributed.check_alike(given)  # first, as they name the folder
        self.folder = Path(opt.save_dir) / kind / name
        self.epochs, self.save_seconds = opt.epochs, opt.save_seconds
        self.patience = getattr(opt, "patience", None)
        self.identity = identity
        self.options: dict = dict(identity)
        self.recorded: dict | None = None
        self.history: list[dict] = []
        self.state: dict | None = None
        self.steps = 0
        self._tb_folder = Path(opt.save_dir) / tb_kind / name
        self._last = self.folder / f"{stem}_last.pth"
        self._best = self.folder / f"{stem}_best.pth"
        self._next_best = self.folder / f"{stem}_best.pth.next"
        self._resume = self.folder / "resume.pth"
        self._unsaved: dict | None = None
        self._unsaved_best: dict | None = None
        self._saved_at = -math.inf
        self._tracker: str | None = opt.log
        self._logger: Logger | None = None
        self._lock = FileLock(self.folder / "lock")
        self._writes = distributed.rank() == 0
        distributed.in_first(self._claim)
        distributed.check_shared(self.folder)
        self._load(opt.resume)
        hashes = {} if self.recorded is None else {key: None for key in self.recorded if key.endswith("_sha256")}
        self._check(hashes | given)  # a file that is left out makes another run too
        if self.steps and len(self.history) >= self.epochs and not self.finished:
            raise InputError(
                f"{self.folder} is inside epoch {self.first_epoch}: use --epochs {self.first_epoch} or more"
            )

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tb_folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            release_at_end(self)
        except Timeout:
            raise InputError(f"another process is running in {self.folder}; wait or use another --name") from None
        except OSError as error:
            raise OSError(f"cannot write to {self.folder} ({error.strerror}); choose another --save_dir") from error

    def release(self) -> None:
        """Let other processes have the folder; a folder without anything but the lock, of a refused run, goes."""
        lock = Path(self._lock.lock_file)
        with contextlib.suppress(OSError):
            if self._lock.is_locked and [*self.folder.iterdir()] == [lock]:
                lock.unlink()
                self.folder.rmdir()
                self._tb_folder.rmdir()
        self._lock.release()

    def _load(self, resume: str) -> None:
        if distributed.restarted() and self._resume.exists():  # the first start has obeyed --resume
            resume = "auto"
        path = self._resume if resume in ("auto", "none") else Path(resume)
        if self._resume.exists() and (resume == "none" or path.resolve() != self._resume.resolve()):
            raise InputError(f"{self.folder} holds a run already; resume it, delete it, or use another --name")
        if resume in ("auto", "none") and not path.exists():
            return
        saved = checkpoint.load(path)
        if not {"options", "history", "state"} <= saved.keys():
            raise InputError(f"{path} is not the resume.pth of a run")
        self.recorded, self.history, self.state = saved["options"], saved["history"], saved["state"]
        self.steps = saved.get("steps", 0)
        self._note(self.steps)

    def _note(self, steps: int = 0) -> None:
        """Note where the run would be resumed."""
        epoch = len(self.history)
        resumes(self.folder, f"step {steps} of epoch {epoch + 1}" if steps else f"epoch {epoch}")

    def record(self, **values) -> None:
        """Record the options, each ``auto`` resolved.

        Raises:
            InputError: an option that may not change differs from the resumed run's, or from another process's.
        """
        self._check(values)
        self.options = values | self.options

    def _check(self, values: dict) -> None:
        values = {key: value for key, value in values.items() if key not in FREE}
        distributed.check_alike(values)
        if self.recorded is None:
            return
        for key, value in values.items():
            recorded = self.recorded.get(key)
            if setting(key, recorded) != setting(key, value) and key not in without():
                raise InputError(
                    f"{self.folder} holds a run with {key} {recorded}, not {value}: "
                    "use the same options and files to resume it, or another --name for a new run"
                )

    @property
    def first_epoch(self) -> int:
        """The epoch to begin with, counted from 1."""
        return len(self.history) + 1

    @property
    def over(self) -> bool:
        """Whether no epoch is left: all are done, or ``patience`` tested ones in a row were no better than the best."""
        if len(self.history) >= self.epochs or self.patience is None or self.best is None:
            return len(self.history) >= self.epochs
        since = self.history[self.best["epoch"] :]
        return sum("test_acc" in record for record in since) >= self.patience

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, and the logs and the last file are written."""
        if not self.over:
            return False
        try:
            read_record(self.folder)
            # A run that is being extended still has the last file of an earlier epoch.
            return checkpoint.load(self._last).get("epoch") == self.history[-1]["epoch"]
        except (InputError, FileNotFoundError):  # a damaged or missing file is written again
            return False

    def start(self, files: dict[str, bytes] | None = None) -> None:
        """Write the options, and the logs of the epochs that are done.

        Args:
            files: the content of files that the run keeps beside its weights, by name.
        """
        if not self._writes:
            return
        with checkpoint.writing(self.folder):
            for left in self.folder.glob("*.tmp"):  # left by a run that was killed while it wrote
                left.unlink()
        if self._next_best.exists():  # the run was killed while it wrote a checkpoint
            self._settle_best()
        for name, content in (files or {}).items():
            checkpoint.write_bytes(content, self.folder / name)
        checkpoint.write_json(self.options, self.folder / "options.json")
        self._logger = Logger(self.folder, self._tb_folder, self.history, self.options, self._tracker)
        if self.steps:
            print(f"resuming {self.folder} after step {self.steps} of epoch {self.first_epoch}")
        elif self.history:
            print(f"resuming {self.folder} after epoch {len(self.history)}")

    @property
    def best(self) -> dict | None:
        """See ``best_record``."""
        return best_record(self.history)

    def save_inside(self, steps: int, state: dict) -> None:
        """Save the state after so many steps of the epoch that is under way."""
        with unbroken():
            self._unsaved = {"options": self.options, "history": self.history, "state": state, "steps": steps}
            self._write() if self._writes else self._note(steps)

    def end_epoch(self, record: dict, state: dict, model: dict, save_freq: int | None = None) -> None:
        """Take an epoch's record and the state after it, and save them where a checkpoint is due.

        Args:
            record: the line of metrics.jsonl.
            state: the content of ``self.state`` when the run is resumed.
            model: the content of the model's file, written if the epoch is the best so far, see ``best_record``.
            save_freq: the model's file is also kept every so many epochs.
        """
        with unbroken():
            self.history.append(record)
            if not self._writes:
                self._note()
                return
            keeps = save_freq is not None and record["epoch"] % save_freq == 0
            due = keeps or self.over
            due = due or time.monotonic() - self._saved_at >= self.save_seconds
            # The next epoch changes these tensors: what is not written now is copied.
            kept = (lambda content: content) if due else checkpoint.in_memory
            if self.best is record:
                self._unsaved_best = kept(model | record)
            self._unsaved = kept({"options": self.options, "history": self.history, "state": state})
            if keeps:
                checkpoint.save(model | record, self.folder / f"ckpt_epoch_{record['epoch']}.pth")
            if due:
                self._write()
            else:
                write_at_end(self._write)
            self._logger.append(record)

    def _write(self) -> None:
        """Write what is in memory alone: the state, and the best model's file if it is new since the last checkpoint.

        A run that is resumed must find the best model of the epochs that resume.pth knows. The new one therefore waits
        beside the old one until resume.pth is written.
        """
        best, self._unsaved_best = self._unsaved_best, None
        saved, self._unsaved = self._unsaved, None
        write_at_end(None)
        if best is not None:
            checkpoint.save(best, self._next_best)
        checkpoint.save(saved, self._resume)
        self._saved_at = time.monotonic()
        self._note(saved.get("steps", 0))
        if best is not None:
            self._place_best()

    def _place_best(self) -> None:
        """Put the best model's new file in its place."""
        with checkpoint.writing(self._best):
            os.replace(self._next_best, self._best)

    def _settle_best(self) -> None:
        """Put the best model's new file in its place, unless the run is resumed from before its epoch."""
        if self.best is not None and checkpoint.load(self._next_best)["epoch"] == self.best["epoch"]:
            self._place_best()
            return
        with checkpoint.writing(self._best):
            self._next_best.unlink()

    def finish(self, model: dict) -> None:
        """Write the record's hash and the last model's file, which mark the run as finished.

        The hash is written after the last line of metrics.jsonl. A run that is killed in between has no hash: it is
        unfinished, not damaged.
        """
        if self._writes:
            options = self.options | {HASH: record_hash(self.options, self.history)}
            self._logger.finish(self.history)
            checkpoint.write_json(options, self.folder / "options.json")
            checkpoint.save(model | self.history[-1], self._last)

    def print_result(self) -> None:
        """Print one line: the run's accuracy, and its folder."""
        best = self.best
        if len(self.history) < self.epochs:
            print(f"--patience {self.patience}: stopped after epoch {len(self.history)}")
        if best["test_acc"] is None:
            loss = "" if best["heldout_loss"] is None else f"loss {best['heldout_loss']:.4f}, "
            near = f"{best['heldout_knn']:.1f} % of the nearest neighbours as the teacher's"
            print(f"best on the pictures held out: {loss}{near} (epoch {best['epoch']}), in {self.folder}")
            return
        last = next(record for record in reversed(self.history) if "test_acc" in record)
        accuracies = f"{best['test_acc']:.2f} (epoch {best['epoch']}), last: {last['test_acc']:.2f}"
        print(f"best accuracy: {accuracies}, in {self.folder}")
        if self._writes and not self._best.exists():
            print(f"{self._best} is missing: --checkpoint last takes the last epoch's weights in its place")
