"""The grammar of networks' names: where a network comes from, and which file has its weights.

``resnet8x4`` is one of this project's names, ``ViT-B/32`` one of OpenAI's. ``timm:NAME``, ``torchvision:NAME`` and
``open_clip:ARCH/TAG`` are those libraries' own; ``=PATH`` after one of them takes the weights from a local file
instead of the library's download. ``FILE.py:FUNCTION`` is a network of one's own, and ``module:NAME`` one that a Python
program gave.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from errors import InputError

LIBRARIES = ("open_clip", "timm", "torchvision")

# Where networks of one's own come from, in the place of a library.
OWN = ("file", "module")

# OpenAI's own names of its CLIPs.
PUBLISHED = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


class Name(NamedTuple):
    """A network's name in its parts.

    library: one of ``LIBRARIES`` or ``OWN``; None for a name of ours or of OpenAI's, or a bare path.
    name: the library's name for it; FILE.py:FUNCTION for one in a file.
    path: the file of its weights; None where the library has them.
    """

    library: str | None
    name: str
    path: str | None

    def __str__(self) -> str:
        library = "" if self.library in (None, "file") else f"{self.library}:"
        return f"{library}{self.name}" + ("" if self.path is None else f"={self.path}")

    @property
    def short(self) -> str:
        """The name in names of runs: 'timm-resnet18', or 'net-tiny' for some/net.py:tiny."""
        if self.library == "file":
            return f"{own_file(self).stem}-{self.name.rpartition(':')[2]}"
        if self.library == "module":
            return self.name.rpartition("-")[0]
        return "-".join([self.library or "", *self.name.split("/")]).lstrip("-").replace(":", "-")


def parse_name(text: str) -> Name:
    """'timm:resnet18=FILE' to Name('timm', 'resnet18', 'FILE').

    Raises:
        InputError: no name follows a library, no path follows a '=', or no function follows a file of Python.
    """
    library, colon, rest = text.partition(":")
    file, python, function = text.partition(".py:")
    if python and library not in LIBRARIES:
        function, equals, path = function.partition("=")
        if not file or not function.isidentifier() or (equals and not path):
            raise InputError(f"{text!r} is no network: write FILE.py:FUNCTION, or FILE.py:FUNCTION=PATH for weights")
        return Name("file", f"{file}.py:{function}", path or None)
    if colon and library == "module":
        return Name(library, rest, None)
    if not colon or library not in LIBRARIES:
        return Name(None, text, None)
    name, equals, path = rest.partition("=")
    if not name or (equals and not path):
        raise InputError(f"{text!r} is no network: write {library}:NAME, or {library}:NAME=PATH for local weights")
    return Name(library, name, path or None)


def own_file(name: Name) -> Path:
    """The file of a network of one's own."""
    return Path(name.name.rpartition(":")[0])


def at(text: str, file: str | Path) -> str:
    """The name of the same network of one's own, with its code in another file."""
    name = parse_name(text)
    return str(name._replace(name=f"{file}:{name.name.rpartition(':')[2]}"))


# The paper's release calls its models so in the names of runs.
_SHORT_NAMES = {"ViT-B/32": "vit32", "ViT-B/16": "vit16"}


def short_name(clip_mode: str, resolution: int | None = None) -> str:
    """The teacher's name in names of runs and files: the release's, the library's, or the stem of a path.

    Args:
        resolution: height and width of its input, where that is not the network's own.
    """
    if (name := parse_name(clip_mode)).library is not None:
        return name.short if resolution is None else f"{name.short}@{resolution}px"
    if clip_mode in PUBLISHED:
        return _SHORT_NAMES.get(clip_mode, clip_mode.replace("/", "-"))
    return Path(clip_mode).stem


def check_file(name: Name) -> None:
    """Raise an InputError where a name's file of weights, or of Python, is missing."""
    if name.library == "file" and not own_file(name).is_file():
        raise InputError(f"{name.name}: no such file {own_file(name)}")
    if name.path is not None and not Path(name.path).is_file():
        raise InputError(f"{name}: no such file of weights")


# The most names that an error lists.
_FEW = 40


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """An error that lists the known names if they are few, and otherwise the closest ones.

    Names that begin with the given one are the closest.
    """
    known = list(known)
    if len(known) <= _FEW:
        return InputError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    longer = sorted((other for other in known if other.startswith(name)), key=len)
    close = [*longer, *difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    close = list(dict.fromkeys(close))[:3]
    return InputError(f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


class _NotDownloaded(OSError):
    """A failed download, as ``library_errors`` reports it."""


@contextlib.contextmanager
def library_errors(name: Name, resolution: int | None = None, loads: bool = True) -> Iterator[None]:
    """Turn a library's errors about a network into one line that says what to do.

    Args:
        resolution: the resolution that was asked for; None for the library's own.
        loads: whether the library loads weights; without them only building the network can fail.
    """
    logging.disable(logging.ERROR)  # it logs each retry of a download, and that weights are random before loading
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # downloads and strict loading raise whatever they meet
        if isinstance(error, _NotDownloaded):  # an inner ``library_errors`` has reported it already
            error = error.__cause__
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        asked = f"{name.library}:{name.name}" + (f" at {resolution} pixels" if resolution else "")
        if not loads or isinstance(error, (AssertionError, TypeError)):
            raise InputError(f"{asked} cannot be built as asked for ({reason})") from error
        if name.path is None:
            raise _NotDownloaded(
                f"{asked} could not be downloaded ({reason}); with no network, give "
                f"{name.library}:{name.name.partition('/')[0]}=PATH, "
                "a local file of its weights"
            ) from error
        raise InputError(f"{name.path} does not fit {asked} ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)
