"""Errors that end a script in one line instead of a traceback; every file may import this one, which imports none."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there")
_ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable")


class InputError(ValueError):
    """The user's input cannot be used; the message says what is wrong and what to do.

    Any other ValueError is a mistake in the code, and shows its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """A loss term was not finite; training must neither go on nor be saved."""


class SpeedUpFailed(RuntimeError):
    """A step could not be compiled or captured; a script that starts again without that trains all the same.

    Args:
        option: 'compile' or 'graph'.
        reason: what failed.
    """

    def __init__(self, option: str, reason: str):
        what = {"compile": "be compiled", "graph": "be captured as a CUDA graph"}[option]
        super().__init__(f"steps cannot {what} ({reason})")
        self.option = option


class WriteError(OSError):
    """A file or a folder cannot be written; the message says which, and what to do. Earlier content is kept."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's error on writing a file or a folder into a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno, "see to the disk")
        raise WriteError(f"cannot write {path} ({error.strerror or error}): {advice}") from error
