"""Exported students at work: from a folder that export.py wrote, without the run that they are from."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor

from dataset.decode import BadImage, read_rgb
from dataset.listing import shown
from errors import InputError
from evaluation.student import image_transform
from models import create_model
from models.heads import enlarge
from models.weights import load_weights

# From images (B, 3, H, W), normalised or 8-bit, to logits and, where the file gives them, embeddings.
Runner = Callable[[Tensor], list[Tensor]]


# On an x86 processor without VNNI, onnxruntime adds two products of 8-bit numbers in 16 bits, which saturate. With this
# entry of a session it computes exactly there too, and somewhat slower; on other processors the entry changes nothing.
EXACT_8_BIT = ("session.x64quantprecision", "1")


def onnx_session(path: Path, optimized: bool = True) -> onnxruntime.InferenceSession:
    """A session on the CPU, with as many threads as torch uses.

    Args:
        optimized: optimise the graph; without, an 8-bit file computes in float32, between the same 8-bit values.
    """
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_8_BIT)
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_onnx(path: Path, config: dict | None = None, optimized: bool = True) -> Runner:
    """An ONNX file in onnxruntime; ``optimized``: see ``onnx_session``."""
    session = onnx_session(path, optimized)
    name = session.get_inputs()[0].name
    return lambda image: [torch.from_numpy(x) for x in session.run(None, {name: image.numpy()})]


def open_program(path: Path, config: dict | None = None) -> Runner:
    """A program of torch.export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that it reads the file's bytes in place
        program = torch.export.load(path).module()
    return lambda image: list(program(image))


def open_weights(path: Path, config: dict) -> Runner:
    """The library's own network, with the weights in its own naming.

    Raises:
        InputError: the weights do not fit it.
    """
    name, options = config["architecture"], {"num_classes": config["num_classes"], **config["network_options"]}
    try:
        if config["library"] == "timm":
            import timm

            network = timm.create_model(name, checkpoint_path=str(path), **options)
        else:
            build = torchvision.models.get_model if config["library"] == "torchvision" else create_model
            network = build(name, **options)
            load_weights(network, safetensors.torch.load_file(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{config['library']}'s own {name} does not take the weights ({reason})") from error
    network.eval()
    return lambda image: [network(enlarge(image, config["resolution"]))]


_OPENERS = {"onnx": open_onnx, "exported": open_program, "safetensors": open_weights}


def open_file(path: Path, config: dict) -> Runner:
    """The exported file at work, in its own runtime.

    Args:
        config: the content of config.json.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return _OPENERS[config["format"]](path, config)
    except InputError:
        raise
    except Exception as error:  # on a damaged file the runtimes raise whatever they stumble over
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be loaded: is it missing or damaged? ({reason})") from error


def read_config(folder: Path) -> dict:
    """What config.json says in a folder that export.py wrote.

    Raises:
        InputError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no exported student: export one first, or give its folder as --out")
    try:
        config = json.loads(path.read_text())
        if config["format"] in _OPENERS:
            return config
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged") from error
    raise InputError(f"{path} is not what export.py writes")


def read_labels(folder: Path, num_classes: int) -> list[str]:
    """The names of the classes in a folder that export.py wrote.

    Raises:
        InputError: they are not as many as the classes.
    """
    text = (folder / "labels.txt").read_bytes().decode()
    labels = text.removesuffix("\n").split("\n")  # a name may hold what else Unicode takes for the end of a line
    if len(labels) != num_classes:
        raise InputError(f"{folder / 'labels.txt'} has {len(labels)} names for {num_classes} classes")
    return labels


def _read_image(path: str) -> Image.Image:
    try:
        return read_rgb(path)
    except (BadImage, OSError) as error:
        raise InputError(f"{path} cannot be read as an image ({getattr(error, 'strerror', None) or error})") from error


@torch.no_grad()
def classify(folder: Path, files: list[str], top: int = 3) -> list[str]:
    """Classify pictures with an exported file alone; gives a line for each picture, its most probable classes.

    Raises:
        InputError: there is no exported file, its classifier was not trained, its labels are not one a class, or a
            picture cannot be read.
    """
    config = read_config(folder)
    if config["accuracy"] is None:
        raise InputError(f"the student in {folder} was trained without labels: its classifier says nothing")
    facts = config["input"]
    normalization = None if facts["dtype"] == "uint8" else (tuple(facts["mean"]), tuple(facts["std"]))
    transform = image_transform(facts["size"], normalization, facts["stored_size"])
    images = [transform(_read_image(file)) for file in files]
    run = open_file(folder / config["file"], config)
    labels = read_labels(folder, config["num_classes"])
    lines = []
    for file, image in zip(files, images, strict=True):
        shares = run(image[None])[0][0].softmax(0)
        best = shares.topk(min(top, len(labels)))
        told = [f"{labels[place]} {100 * share:.1f} %" for share, place in zip(*map(Tensor.tolist, best), strict=True)]
        lines.append(f"{shown(file)}: {', '.join(told)}")
    return lines
