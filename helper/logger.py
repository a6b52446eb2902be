"""A run's metrics: a line per epoch in metrics.jsonl, and TensorBoard events."""

import json
import os
from pathlib import Path

# tensorboard_logger's generated code works with protobuf's Python implementation only, which has to be chosen
# before protobuf is first imported.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"

import tensorboard_logger

from . import checkpoint


class Logger:
    """Writes each record once, whatever is interrupted.

    Both logs are derived: the checkpoint holds every record, and a resumed run writes them anew from it.

    Args:
        folder: the folder of metrics.jsonl.
        tb_folder: the folder of the TensorBoard events; those that it holds are replaced.
        history: the records of the epochs that are done.

    Raises:
        WriteError: a log cannot be written; ``append`` raises it too.
    """

    def __init__(self, folder: Path, tb_folder: Path, history: list[dict]):
        self._metrics, self._tb_folder = folder / "metrics.jsonl", tb_folder
        checkpoint.write_bytes("".join(map(_line, history)).encode(), self._metrics)
        with checkpoint.writing(tb_folder):
            for events in tb_folder.glob("events.*"):  # the first stage's folder in it stays
                events.unlink()
            self._events = tensorboard_logger.Logger(str(tb_folder), flush_secs=2)
            for record in history:
                self._write_events(record)

    def append(self, record: dict) -> None:
        with checkpoint.writing(self._metrics), open(self._metrics, "a") as file:
            file.write(_line(record))
        with checkpoint.writing(self._tb_folder):
            self._write_events(record)

    def _write_events(self, record: dict) -> None:
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self._events.log_value(name, value, record["epoch"])


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
