"""What the system says against writing, as one kind of error that says which file and what to do."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there")


_ADVICE |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable")


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
