"""The facts of a frozen encoder: a bank of its embeddings needs them, and not the network.

The network is built once to learn its facts; a small file beside the banks keeps them. The file's name is a hash of
everything that decides them: the network's name, the SHA-256 of its weights, the resolution that is asked for, and
the version of the library that builds it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.create import create_encoder, encoder_sha256, library_version
from models.encoders import FrozenEncoder
from models.names import OWN, parse_name, short_name

from . import checkpoint, distributed
from .runtime import DTYPES, teacher_precision

_KEPT = ("name", "sha256", "resolution", "normalization", "interpolation", "antialias", "dim", "published", "facts")


class KnownEncoder:
    """A frozen encoder with known facts; it is called as ``FrozenEncoder`` is, and builds the network at first.

    Attributes:
        name, sha256, resolution, normalization, interpolation, antialias, dim, published, facts: see ``FrozenEncoder``.

    Args:
        known: the attributes.
        build: gives the network.
    """

    def __init__(self, known: dict, build: Callable[[], FrozenEncoder]):
        for name in _KEPT:
            setattr(self, name, known[name])
        self.normalization = tuple(map(tuple, known["normalization"]))
        self._build = build
        self._network: FrozenEncoder | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, resolution, resolution) to embeddings (B, dim), float32."""
        if self._network is None:
            self._network = self._build()
        return self._network(image)


def load_encoder(clip_mode: str, clip_root: str, device: str, amp: str, resolution: int | None = None) -> FrozenEncoder:
    """The frozen encoder on the device, in the precision that ``teacher_precision`` gives."""
    precision = teacher_precision(device, amp, published=parse_name(clip_mode).library is None)
    return create_encoder(clip_mode, clip_root, DTYPES[precision], resolution).to(device)


def encoder_facts(clip_mode: str, clip_root: str, resolution: int | None, save_dir: str) -> dict:
    """The facts of a frozen encoder, which are the attributes of a ``KnownEncoder``.

    The file of its weights is hashed every time, so that other weights have other facts. A network with a library's
    own weights is built every time, as there is no file to hash, and so is a network of one's own.

    Args:
        clip_mode, clip_root, resolution: see ``create_encoder``.
        save_dir: folder of all results.

    Raises:
        InputError, OSError: see ``create_encoder``.
    """
    name = parse_name(clip_mode)
    if name.library in OWN or (name.library is not None and name.path is None):
        return _facts_of(create_encoder(clip_mode, clip_root, resolution=resolution))
    network = None if name.library is None else name.name
    key = [name.library, network, encoder_sha256(clip_mode, clip_root), resolution, library_version(name)]
    path = Path(save_dir) / "teacher_bank" / "encoders" / f"{_digest(key)[:16]}.json"
    known = _read(path)
    if known is None:
        known = _facts_of(create_encoder(clip_mode, clip_root, resolution=resolution))
        if distributed.rank() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"cannot write to {save_dir} ({error.strerror}); choose another --save_dir") from error
            checkpoint.write_json({"facts": known, "sha256": _digest(known)}, path)
    # Two files with the same weights are one encoder; each is called by its own name.
    return known | {"name": short_name(clip_mode)}


def _facts_of(encoder: FrozenEncoder) -> dict:
    return {name: getattr(encoder, name) for name in _KEPT}


def _read(path: Path) -> dict | None:
    """The facts in a file; None where it is not there, or damaged."""
    try:
        found = json.loads(path.read_text())
        return found["facts"] if found["sha256"] == _digest(found["facts"]) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
