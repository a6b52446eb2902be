"""Networks of one's own: a function in a file, ``FILE.py:FUNCTION``, or a module that a Python program gives."""

import contextlib
import copy
import hashlib
import sys
import traceback
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import InputError

from .heads import Linear
from .library import LibraryModel, Network
from .maps import take_maps
from .names import Name, check_file, own_file, parse_name
from .weights import load_weights, read_state, sha256_of, sha256_of_state

# A function is asked for so many classes where its classifier is taken off.
_CLASSES = 1000

# How a frozen encoder is fed that does not say so: as networks are that were trained on ImageNet.
_RESOLUTION = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INTERPOLATION = "bicubic"

# The modules that this Python program gave, by name.
_given: dict[str, nn.Module] = {}


def give(module: nn.Module) -> str:
    """The name that stands for a module in this program: ``module:CLASS-HASH``.

    The hash is that of its layers and weights, so that a module with the same ones has the same name. A copy is kept.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"a network is a name or an nn.Module, not {type(module).__name__}")
    name = f"{type(module).__name__}-{_module_sha256(module)[:12]}"
    _given[name] = copy.deepcopy(module).cpu()
    return f"module:{name}"


def give_again(name: str, module: nn.Module) -> None:
    """Let a module stand for the one that had this name in another program; only its weights may differ.

    Raises:
        InputError: the name is not that of a module.
    """
    if parse_name(name).library != "module":
        raise InputError(f"the student is {name}, not a module of a Python program: leave the module out")
    _given[name.removeprefix("module:")] = copy.deepcopy(module).cpu()


def _module_sha256(module: nn.Module) -> str:
    return hashlib.sha256(f"{module!r}\n{sha256_of_state(module.state_dict())}".encode()).hexdigest()


def own_sha256(name: Name, net: nn.Module | None = None) -> str:
    """The SHA-256 of a frozen encoder of one's own: of its code and of its weights.

    Args:
        net: the network, where it is built already; a network with a file of weights need not be built.
    """
    if name.library == "module":
        return _module_sha256(_copy(name))
    if name.path is None:
        weights = sha256_of_state((net or _build(name)).state_dict())
    else:
        weights = sha256_of(name.path)
    return hashlib.sha256(f"{sha256_of(own_file(name))} {weights}".encode()).hexdigest()


@contextlib.contextmanager
def _errors(name: Name, what: str) -> Iterator[None]:
    """Turn whatever the code of a network raises into an InputError that gives the line."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a script without a guard ends by sys.exit
        file = str(own_file(name)) if name.library == "file" else None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f", line {lines[-1]}" if lines else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{name.name}{where}: {what} failed ({reason})") from error


def _build(name: Name, *args) -> nn.Module:
    """What the function of a file makes of ``args``; a frozen encoder's random weights, if any, are always the same.

    The file is run as a module of its own. It stands alone: it imports installed packages, and no files beside it.
    """
    path, function = own_file(name), name.name.rpartition(":")[2]
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"{name.name}: {path} cannot be read ({error.strerror})") from error
    module = types.ModuleType(f"own_{hashlib.sha256(source).hexdigest()[:12]}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look there
    with _errors(name, "running the file"):
        exec(compile(source, str(path), "exec"), module.__dict__)
    made = getattr(module, function, None)
    if not callable(made):
        own = [key for key, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
        raise InputError(f"{path} has no function {function}; it has {', '.join(own) or 'none'}")
    with _errors(name, f"{function}({', '.join(map(str, args))})"), torch.random.fork_rng(enabled=not args):
        if not args:
            torch.manual_seed(0)
        network = made(*args)
    if not isinstance(network, nn.Module):
        raise InputError(f"{name.name} gives no nn.Module, but {type(network).__name__}")
    return network


def _copy(name: Name) -> nn.Module:
    if name.name not in _given:
        raise InputError(
            f"{name.library}:{name.name} is a module that a Python program gave: in another program, give it to "
            "load_student(run, module=...), or use FILE.py:FUNCTION in its place"
        )
    return copy.deepcopy(_given[name.name])


def create_own_model(name: Name, num_classes: int, maps: bool, preact: bool) -> LibraryModel:
    """A classifier of one's own with the interface of our own backbones.

    Its last linear layer is its classifier, which has to give its output.

    Args:
        name: of the file and function, which is called with the number of classes, or of the module.
        num_classes: 0 for no classifier.
        maps, preact: see ``create_library_model``.

    Raises:
        InputError: the file, its function or the network is not what it has to be.
    """
    net = _copy(name) if name.library == "module" else _build(name, num_classes or _CLASSES)
    found = [path for path, module in net.named_modules() if isinstance(module, nn.Linear) and path]
    if not found:
        raise InputError(f"{name.name} has no linear layer to classify with: a student ends in one")
    linear = net.get_submodule(found[-1])
    if num_classes and linear.out_features != num_classes:
        raise InputError(
            f"{name.name}: its last linear layer {found[-1]} gives {linear.out_features} classes, not {num_classes}"
        )
    net.set_submodule(found[-1], nn.Identity())
    taps = take_maps(name.name, net, preact) if maps else None
    model = LibraryModel(name.name, Network(net, found[-1], None, None, linear.in_features), num_classes, taps)
    if num_classes:
        model.classifier = Linear(linear.in_features, num_classes, bias=linear.bias is not None)
        model.classifier.load_state_dict(linear.state_dict())
    return model


@torch.no_grad()
def check_own_model(model: LibraryModel, name: Name, size: int) -> None:
    """Try a classifier of one's own on images of ``size`` pixels.

    Raises:
        InputError: its code fails, or it does not give the output of its last linear layer.
    """
    seen: list[Tensor] = []
    layer = model.net.get_submodule(model.classifier_name)  # what stands in the classifier's place
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    mode = model.net.training
    try:
        with _errors(name, f"forward of images of {size} pixels"):
            out = model.net.eval()(images)
    finally:
        hook.remove()
        model.net.train(mode)
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if len(seen) != 1 or shape != (2, model.num_features) or not torch.equal(seen[0], out):
        raise InputError(
            f"{name.name}: forward has to give what its last linear layer gives, which is {model.classifier_name}, for "
            f"features (2, {model.num_features}); in its place comes {shape}"
        )


class OwnEncoder(NamedTuple):
    """A frozen encoder of one's own, and how it is fed; see ``models.encoders.FrozenEncoder``."""

    net: nn.Module
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@torch.no_grad()
def own_encoder(name: Name, resolution: int | None) -> OwnEncoder:
    """A frozen encoder of one's own: a module from images (B, 3, R, R) to embeddings (B, D).

    Its attributes ``resolution``, ``mean``, ``std`` and ``interpolation`` say how it is fed; by default 224 pixels,
    ImageNet's mean and std, and bicubic. An attribute ``dim`` says how wide its embedding is.

    Args:
        name: of the file and function, which is called without arguments, or of the module.
        resolution: overrides the attribute.

    Raises:
        InputError: the file, its function, its weights or the network are not what they have to be.
    """
    check_file(name)
    net = (_copy(name) if name.library == "module" else _build(name)).eval()
    if name.path is not None:
        state = read_state(name.path)
        try:
            load_weights(net, state)
        except RuntimeError as error:
            raise InputError(f"{name.path} does not fit {name.name} ({' '.join(str(error).split())[:200]})") from error
    resolution = resolution or getattr(net, "resolution", _RESOLUTION)
    mean, std = (tuple(getattr(net, key, value)) for key, value in (("mean", _MEAN), ("std", _STD)))
    if not isinstance(resolution, int) or len(mean) != 3 or len(std) != 3:
        raise InputError(f"{name.name}: resolution is a number of pixels, mean and std are three numbers each")
    with _errors(name, f"forward of images of {resolution} pixels"):
        out = net(torch.zeros(2, 3, resolution, resolution))
    shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    dim = getattr(net, "dim", None)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 2 or (isinstance(dim, int) and out.shape[1] != dim):
        told = f"(2, {dim})" if isinstance(dim, int) else "(2, D)"
        raise InputError(f"{name.name}: two images have to give embeddings {told}, but give {shape}")
    return OwnEncoder(net, resolution, mean, std, getattr(net, "interpolation", _INTERPOLATION))
