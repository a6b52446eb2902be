"""Files that are either whole or not there: written beside their target, flushed, renamed."""

import contextlib
import copy
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from errors import InputError, writing
from models.weights import load_plain


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of ``path`` at the end of the block, unless an error ends the block.

    After a crash at any moment the file holds the old content or the new, nothing between.

    Raises:
        WriteError: the file cannot be written; it keeps the old content.
    """
    with writing(path):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive too
        finally:
            os.close(folder)


def write_bytes(data: bytes, path: Path) -> None:
    """Replace a file's content, see ``replacing``."""
    with replacing(path) as file:
        file.write(data)


def write_json(value: Any, path: Path) -> None:
    write_bytes((json.dumps(value, indent=1) + "\n").encode(), path)


def in_memory(state: Any) -> Any:
    """A copy of tensors, numbers, strings and containers of them, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # a state dict also has the versions of its modules
        copied.update((name, in_memory(value)) for name, value in state.items())
        return copied
    return type(state)(map(in_memory, state)) if isinstance(state, (list, tuple)) else state


def save(state: dict, path: Path) -> None:
    """Save tensors, numbers, strings and containers of them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(buffer.getvalue(), path)


def load(path: Path) -> dict:
    """Load a file that ``save`` wrote onto the CPU.

    Raises:
        InputError: the file is corrupt, or holds more than plain data.
        OSError: it cannot be read.
    """
    try:
        state = load_plain(path)
    except OSError:
        raise
    except Exception as error:  # on a damaged file torch raises whatever it stumbles over
        raise InputError(f"{path} is not a checkpoint of this project, or is corrupt") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is not a checkpoint of this project")
    return state
