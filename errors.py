"""What ends a script in one line instead of a traceback; every room may import this file, which imports none."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there")
_ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable")


class InputError(ValueError):
    """What the user gave cannot be worked with: the message says what is wrong and what to do.

    Any other ValueError is a mistake in the code, and shows its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """A loss term was not finite; training must not go on, nor be saved."""


class WriteError(OSError):
    """A file or a folder cannot be written; says which and what to do. What was there before is still there."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing to a file or a folder into a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno, "see to the disk")
        raise WriteError(f"cannot write {path} ({error.strerror or error}): {advice}") from error
