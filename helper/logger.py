"""A run's metrics: a line per epoch in metrics.jsonl, TensorBoard events, and trackers that were asked for."""

import json
import os
import socket
import time
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.record_writer import RecordWriter

from . import checkpoint
from .records import best_record
from .trackers import open_tracker

# The measurements of the best epoch that stand beside the hyper-parameters, where they were measured.
_FINAL = ("test_acc", "test_acc_top5", "val_acc", "test_loss", "heldout_loss", "heldout_knn")

# The picture of the first batch's views in a run's folder.
VIEWS = "views.png"


class Logger:
    """Writes each record once, whatever is interrupted.

    All logs are derived: the checkpoint holds every record, and a resumed run writes them anew from it.

    Args:
        folder: the run's folder; metrics.jsonl goes there, and the picture ``VIEWS`` lies there where there is one.
        tb_folder: the folder of the TensorBoard events; those that it holds are replaced.
        history: the records of the epochs that are done.
        options: the run's, which are TensorBoard's hyper-parameters.
        tracker: see ``open_tracker``.

    Raises:
        WriteError: a log cannot be written; ``append`` raises it too.
        InputError: see ``open_tracker``.
    """

    def __init__(self, folder: Path, tb_folder: Path, history: list[dict], options: dict, tracker: str | None = None):
        self._metrics, self._tb_folder = folder / "metrics.jsonl", tb_folder
        checkpoint.write_bytes("".join(map(_line, history)).encode(), self._metrics)
        with checkpoint.writing(tb_folder):
            for events in tb_folder.glob("events.*"):  # the first stage's folder in it stays
                events.unlink()
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._events = RecordWriter(open(tb_folder / name, "wb"))  # noqa: SIM115
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            self._write_options(options)
            if (folder / VIEWS).exists():
                self._write_picture(folder / VIEWS)
            for record in history:
                self._write_events(record)
        self._tracker = open_tracker(tracker, folder, history, options)

    def append(self, record: dict) -> None:
        """Log an epoch's record."""
        with checkpoint.writing(self._metrics), open(self._metrics, "a") as file:
            file.write(_line(record))
        with checkpoint.writing(self._tb_folder):
            self._write_events(record)
        self._tracker.append(record)

    def finish(self, history: list[dict]) -> None:
        """Log the best epoch's measurements as the run's own."""
        final = {f"best/{name}": value for name, value in _final(history).items()}
        with checkpoint.writing(self._tb_folder):
            self._write_scalars(final, history[-1]["epoch"])
        self._tracker.finish(final)

    def _write_events(self, record: dict) -> None:
        scalars = {name: value for name, value in record.items() if name != "epoch" and value is not None}
        self._write_scalars(scalars, record["epoch"])

    def _write_scalars(self, scalars: dict[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write_options(self, options: dict) -> None:
        """The options as hyper-parameters, and which measurements belong to them."""
        plain = {name: x if isinstance(x, bool | int | float | str) else json.dumps(x) for name, x in options.items()}
        metrics = [hparams.Metric(f"best/{name}") for name in _FINAL]
        for summary in (hparams.hparams_config_pb([], metrics), hparams.hparams_pb(plain)):
            self._write(Event(wall_time=time.time(), summary=summary))

    def _write_picture(self, path: Path) -> None:
        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        value = Summary.Value(tag="views of the first batch", image=image)
        self._write(Event(wall_time=time.time(), summary=Summary(value=[value])))

    def _write(self, event: Event) -> None:
        self._events.write(event.SerializeToString())
        self._events.flush()


def _final(history: list[dict]) -> dict[str, float]:
    best = best_record(history) or {}
    return {name: best[name] for name in _FINAL if best.get(name) is not None}


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
