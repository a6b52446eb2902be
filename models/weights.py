"""Files of weights: read without running code, recognised by their content."""

import argparse
import contextlib
import functools
import hashlib
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PosixPath

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from errors import InputError


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal; a file that stays as it is, is read once."""
    facts = os.stat(path)
    return _sha256_of(os.path.abspath(path), facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _sha256_of(path: str, *facts: int) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_state(state: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        x = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


_BLOCK = 1 << 20


def check_archive(path: str | os.PathLike) -> None:
    """Raise an InputError where an archive of torch.save's or TorchScript's is damaged, or would take more memory.

    torch checks no checksum of the archive, and unpacks compressed data to whatever size the archive claims.
    TorchScript's code may be compressed: it is not read.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as old torch's files are
            return
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if "/code/" not in member.filename]
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError("it holds compressed data")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise InputError("its parts are larger than the file")
        for member in members:
            with archive.open(member) as file:
                while file.read(_BLOCK):  # which compares the checksum at the end
                    pass


def _numpy_number(kind: np.dtype, content: bytes) -> np.generic:
    """A number of NumPy's from its bytes; NumPy's own function would take a kind's word for its size."""
    return np.frombuffer(content, kind, count=1)[0]


# Plain data that training scripts keep beside the weights and that torch does not admit by itself: parsed options,
# paths, and NumPy's numbers, such as the best accuracy. Releases of NumPy and Python name them differently.
_PLAIN = [
    argparse.Namespace,
    PosixPath,
    (PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilBHILefdU"},
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]


def load_plain(path: str | os.PathLike) -> object:
    """Tensors, numbers, strings and containers of them, from a file of torch.save's, onto the CPU.

    Raises:
        Exception: the file is damaged or holds anything else; torch raises whatever kind it stumbles over.
        OSError: it cannot be read.
    """
    check_archive(path)
    if is_torchscript(path):
        raise InputError("it is a TorchScript archive")
    with torch.serialization.safe_globals(_PLAIN):
        value = torch.load(path, map_location="cpu", weights_only=True)
    _check_sizes(value)
    return value


def _check_sizes(value: object) -> None:
    """Raise an InputError where a tensor, by strides of zero, claims to be larger than its storage."""
    seen, left = set(), [value]
    while left:
        value = left.pop()
        if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"a tensor of shape {tuple(value.shape)} is larger than what is stored of it")
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether a file begins as safetensors do: with the length of its header, which is JSON."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(1) == b"{" and length <= os.path.getsize(path)


def load_torchscript(path: str | os.PathLike) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of a TorchScript archive by their dotted names, onto the CPU.

    None of its code is compiled or run: torch.jit.load would run ``__setstate__``, which can open files.

    Raises:
        Exception: as ``load_plain``.
    """
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
        state = dict(_named_tensors(_TorchScript(archive, root).load()))
    _check_sizes(state)
    return state


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class _TorchScript(pickle.Unpickler):
    """Reads data.pkl of an archive; modules of every class become plain objects with the same attributes."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.module = type("Module", (), {})  # a class of its own: what the file does to it ends with the file

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return self.module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda numbers, offset, size, stride, *_: numbers.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda items: items
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is neither a module nor a tensor")

    def persistent_load(self, identity: tuple) -> Tensor:
        _, dtype, key, _, count = identity
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        if len(content) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"{key} does not hold {count} numbers")
        return torch.frombuffer(content, dtype=dtype)


def _named_tensors(module: object) -> Iterator[tuple[str, Tensor]]:
    seen, left = set(), [("", module)]
    while left:
        prefix, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif type(value) is type(module):
                left.append((f"{prefix}{name}.", value))


# Where training scripts put the weights in what they save: averaged ones first, which timm takes too.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model_state_dict", "model", "net", "network", "weights")

# What wrappers of a network put before every name: DataParallel, Lightning modules.
_PREFIXES = ("module.", "model.", "net.", "network.")

# torch.compile puts this before the names of what it compiled, wherever that is in the network.
_COMPILED = "_orig_mod."


# torchvision published its DenseNets with layers called norm.1, as no module may be called any more.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def read_file(path: str | os.PathLike) -> object:
    """What a file of safetensors, torch.save or TorchScript holds, recognised by its content.

    A file of safetensors or TorchScript gives tensors by name.

    Raises:
        InputError: the file is corrupt, or it holds anything but plain data.
        OSError: the file cannot be read.
    """
    try:
        if is_safetensors(path):
            return safetensors.torch.load_file(path)
        if is_torchscript(path):
            # A mask is a tensor of the modules, but neither a parameter nor a buffer.
            return {name: x for name, x in load_torchscript(path).items() if not name.endswith("attn_mask")}
        return load_plain(path)
    except OSError:
        raise
    except Exception as error:  # on a damaged file the loaders raise whatever they stumble over
        if objects := _other_objects(path):
            raise InputError(
                f"{path} holds more than plain data ({', '.join(objects)}): save the network's state_dict() alone"
            ) from error
        raise InputError(
            f"{path} is no file of weights (state dict or safetensors), is corrupt, or holds more than plain data"
        ) from error


def _other_objects(path: str | os.PathLike) -> list[str]:
    """The classes and functions in a file of torch.save's that are no plain data; none where nobody can tell."""
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_PLAIN):  # as the loaders, on a damaged file
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]
    return []


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """A network's weights by name, from a file that ``read_file`` reads; see ``named_tensors``.

    Raises:
        InputError, OSError: as these two.
    """
    return named_tensors(read_file(path), path)


def named_tensors(value: object, path: str | os.PathLike) -> dict[str, Tensor]:
    """A network's weights by name, out of what a training script saved.

    Weights may lie below ``state_dict``, ``model``, ``model_state_dict`` and the like, also nested. Averaged weights
    (``state_dict_ema``, ``model_ema``, ``ema``) come before the others, as in timm, which is printed. Names lose what
    DataParallel, torch.compile and Lightning put before them, and torchvision's old DenseNets get their new ones. A
    batch norm without a counter of batches gets one.

    Args:
        value: what the file holds.
        path: the file, for messages.

    Raises:
        InputError: it holds no named tensors.
    """
    found = _unwrapped(value, ())
    if found is None:
        held = f" but {', '.join(map(str, [*value][:6]))}" if isinstance(value, dict) and value else ""
        raise InputError(f"{path} is no file of weights: it holds no named tensors alone{held}; save the state_dict()")
    state, wrappers = found
    averaged = [name for name in wrappers if name in _AVERAGED]
    if averaged:
        print(f"{path}: takes the averaged weights, {averaged[0]}")
    names = _short_names([*state], lightning=isinstance(value, dict) and "pytorch-lightning_version" in value)
    result = {_OLD_DENSENET.sub(r"\1\2", short): state[name] for name, short in names.items()}
    for name in [name for name in result if name.endswith("running_var")]:
        result.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return result


def _unwrapped(value: object, wrappers: tuple[str, ...]) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """The first dictionary of tensors alone, from outside in, and what it lies below; None where there is none."""
    if not isinstance(value, dict):
        return None
    if value and all(isinstance(x, Tensor) for x in value.values()):
        return value, wrappers
    inside = (_unwrapped(value.get(name), (*wrappers, name)) for name in _WRAPPERS)
    return next((found for found in inside if found is not None), None)


def _short_names(names: list[str], lightning: bool) -> dict[str, str]:
    """The names without what wrappers put before them; those that are none of the network's are left out.

    Args:
        lightning: the names are a Lightning module's, which has losses and metrics beside the network.
    """
    short = {name: name.replace(_COMPILED, "") for name in names}
    while True:
        if any(name.startswith("module.") for name in short.values()):  # the counter of torch's AveragedModel
            short = {old: name for old, name in short.items() if name != "n_averaged"}
        for prefix in _PREFIXES:
            below = {old: name.removeprefix(prefix) for old, name in short.items() if name.startswith(prefix)}
            if below and (lightning or len(below) == len(short)):
                short = below
                break
        else:
            return short


def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """``load_state_dict`` of named tensors alone, which lack the versions that PyTorch keeps of a module's layers.

    They are taken to be the module's own: torchvision's MNASNets refuse a state without versions.

    Raises:
        RuntimeError: names or shapes differ.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata
    module.load_state_dict(versioned)
