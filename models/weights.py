"""Files of weights: read without running code, recognised by their content."""

import hashlib
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
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


# Where training scripts put the weights in what they save.
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """Named tensors from a .safetensors file or one of torch.save's; of a training checkpoint, its model's.

    Raises:
        ValueError: corrupt, or it holds anything but plain data.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on a damaged file the loaders raise whatever they stumble over
        raise ValueError(f"{path} is no file of weights (state dict or safetensors), or is corrupt") from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} is no file of weights: it holds no named tensors")
    return {name.removeprefix("module."): x for name, x in state.items()}
