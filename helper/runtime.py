"""Where and how a run computes: device, precision, compilation; every ``auto`` is resolved here, once."""

import argparse
import contextlib
import copy
import ctypes
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.views import CIFAR_VIEWS, Views, views_of_size
from distiller_zoo import METHODS
from errors import InputError, SpeedUpFailed

from . import distributed
from .exits import spares, without
from .options import AUTO_VIEWS

# torch.compile takes some 46 s for resnet8x4 on two cores; with AMX it saves 9 ms a step, and so many steps earn it
# back. Without AMX the convolutions decide the time, and a compiled step is no faster (docs/performance.md).
COMPILE_PAYS_AFTER_STEPS = 5000

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# glibc's names of mallopt's parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have the C library keep the memory that a step frees for the next one.

    glibc gives large blocks back to the system, which hands them out again page by page, filled with zeros: from 512
    samples in a step on, that takes a third of the time (docs/performance.md).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def why_no_gpu() -> str | None:
    """Why PyTorch cannot use a GPU that seems to be here; None where none seems to be."""
    if not os.path.exists("/dev/nvidia0") and shutil.which("nvidia-smi") is None:
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "it is hidden: see CUDA_VISIBLE_DEVICES"


def resolve_device(device: str) -> str:
    """'cpu' or 'cuda'; on a GPU, PyTorch then chooses convolutions by trying them.

    A GPU that ``auto`` cannot use is told.

    Raises:
        InputError: cuda is asked for, but this machine has no GPU, or fewer GPUs than processes.
    """
    able = device != "cpu" and torch.cuda.is_available()
    reason = None if able or device == "cpu" else why_no_gpu()
    if device == "cuda" and not able:
        told = "" if reason is None else f" ({reason})"
        raise InputError(f"--device cuda: PyTorch finds no CUDA GPU here{told}; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if able else "cpu"
        if reason is not None:
            print(f"a GPU is here, but PyTorch {torch.__version__} cannot use it ({reason}): computing on the CPU")
    local = os.environ.get("LOCAL_RANK")  # set by torchrun
    if device == "cuda" and local is not None and int(local) >= torch.cuda.device_count():
        raise InputError(f"more processes than GPUs: start at most {torch.cuda.device_count()}, or use --device cpu")
    torch.backends.cudnn.benchmark = True  # shapes never change, but for the last batch
    # PyTorch's convolutions use TF32 by default. Here float32 is float32; --amp alone decides what may be rounded.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def resolve_amp(amp: str, device: str) -> str:
    """'off', 'bf16' or 'fp16': bf16 where the processor computes in it.

    Raises:
        InputError: fp16 on a CPU, which has no fast fp16.
    """
    if amp == "fp16" and device != "cuda":
        raise InputError("--amp fp16 needs --device cuda; on a CPU use bf16 or off")
    if amp != "auto":
        return amp
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "off"


def resolve_compile(compile_: str, device: str, steps: int) -> str:
    """'on' or 'off': on where it makes steps faster, a compiler is there and the run earns the time back.

    Args:
        steps: training steps of the whole run.

    Raises:
        InputError: compilation is asked for, but there is no compiler, C++'s for a CPU, C's for CUDA, or no Python.h.
    """
    # Inductor and Triton look for it in this way.
    variable, *names = ("CC", "gcc", "clang") if device == "cuda" else ("CXX", "g++")
    named = [os.environ[variable]] if variable in os.environ else names
    lacks = None
    if all(shutil.which(name) is None for name in named):
        lacks = f"a compiler ({names[0]}, or the one that {variable} names)"
    elif not (headers := Path(sysconfig.get_paths()["include"], "Python.h")).exists():
        lacks = f"{headers} (on Debian and Ubuntu: apt install python3-dev)"
    if compile_ == "on" and lacks is not None:
        raise InputError(f"--compile on needs {lacks}; install it or use off")
    if compile_ == "auto":
        faster = device == "cuda" or torch.cpu._is_amx_tile_supported()
        pays = faster and steps >= COMPILE_PAYS_AFTER_STEPS and "compile" not in without()
        if pays and lacks is not None:
            print(f"steps are not compiled, which makes them slower: that needs {lacks}")
        return "on" if pays and lacks is None else "off"
    return compile_


def compiled(function: Callable) -> Callable:
    """What torch.compile makes of a function.

    Raises:
        SpeedUpFailed: the first call failed. It compiles the backward pass too.
    """
    fast, called = torch.compile(function), False

    def call(*args):
        nonlocal called
        try:
            result = fast(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler, Triton and the driver raise whatever they stumble over
            if called:
                raise
            raise SpeedUpFailed("compile", f"{type(error).__name__}: {error}".partition("\n")[0]) from error
        called = True
        return result

    return call


def resolve_graph(opt: argparse.Namespace) -> str:
    """'on' or 'off': whether steps are recorded once and replayed, see ``helper.capture``.

    Args:
        opt: ``graph`` as parsed; device, processes and teacher_views are resolved.

    Raises:
        InputError: a recording is asked for, but cannot be made.
    """
    method = getattr(opt, "distill", None)
    if opt.device != "cuda":
        lacks = "needs --device cuda"
    elif opt.processes > 1:
        lacks = f"needs a single process, not {opt.processes}"
    elif method is not None and METHODS[method].waits:
        lacks = f"does not work with --distill {method}, which waits for the GPU in every step"
    elif method not in (None, "none") and opt.teacher_views == 0:
        lacks = "does not work with --teacher_views 0, which encodes every batch"
    else:
        return "off" if opt.graph == "off" or (opt.graph == "auto" and "graph" in without()) else "on"
    if opt.graph == "on":
        raise InputError(f"--graph on {lacks}: leave it at auto")
    return "off"


def teacher_precision(device: str, amp: str, published: bool = True) -> str:
    """The frozen encoder's precision: fp16 for OpenAI's on CUDA, as published; otherwise ``amp``, or fp32 for 'off'.

    Args:
        published: the weights are in OpenAI's format.
    """
    if device == "cuda" and published:
        return "fp16"
    return "fp32" if amp == "off" else amp


def autocast(device: str, amp: str) -> contextlib.AbstractContextManager:
    """The forward pass's context."""
    return torch.autocast(device, dtype=DTYPES.get(amp), enabled=amp != "off")


def resolve_teacher_views(teacher_views: str | int, device: str, views: Views) -> int:
    """How many views of each image the teacher encodes beforehand; 0 if it encodes every batch.

    Raises:
        InputError: the images have fewer views.
    """
    if teacher_views == "auto":
        return AUTO_VIEWS[device] if views.count is None else min(AUTO_VIEWS[device], views.count)
    if teacher_views == "all" and views.count is None:
        raise InputError("--teacher_views all: a photograph has endlessly many views; use a number of them, or 0")
    if teacher_views == "all":
        return views.count
    if views.count is not None and teacher_views > views.count:
        raise InputError(
            f"--teacher_views {teacher_views}: an image of {views.size} pixels has {views.count} views; use all"
        )
    return teacher_views


def check_machine(opt: argparse.Namespace, size: int | None = None) -> None:
    """Raise an InputError where this machine, or images of a known size, lack what the options ask for.

    No image has to be there.

    Args:
        opt: the options, with or without ``auto``.
        size: height and width of the images in pixels; None where only the images tell.
    """
    processes = distributed.count()
    if opt.device == "cuda":
        resolve_device(opt.device)
    device = "cuda" if opt.device != "cpu" and torch.cuda.is_available() else "cpu"
    resolve_amp(opt.amp, device)
    if getattr(opt, "teacher_views", None) is not None and size is not None:
        resolve_teacher_views(opt.teacher_views, device, views_of_size(size))
    if opt.batch_size < processes:
        raise InputError(f"--batch_size {opt.batch_size} is less than a sample for each of {processes} processes")
    if getattr(opt, "sync_bn", False) and device != "cuda":
        raise InputError("--sync_bn needs --device cuda: PyTorch's SyncBatchNorm has no CPU version")
    if getattr(opt, "compile", "off") == "on":
        resolve_compile(opt.compile, device, steps=0)
    if getattr(opt, "graph", "off") == "on":
        resolve_graph(argparse.Namespace(**(vars(opt) | {"device": device, "processes": processes})))


def resolve(
    opt: argparse.Namespace, recorded: dict | None, images: int, views: Views = CIFAR_VIEWS
) -> argparse.Namespace:
    """A copy of the options with every ``auto`` and ``all`` resolved, and with the number of processes.

    It prints what each ``auto`` became. A resumed run keeps what was resolved when it began.

    Args:
        opt: the parsed options; they are not changed.
        recorded: the options of the run that is resumed, or None.
        images: number of training images, which decides whether compiling pays.
        views: the data set's views.

    Raises:
        InputError: the machine or the data set lacks what is asked for, or a resumed run's cosine would get another
            end.
    """
    if recorded and recorded.get("schedule") == "cosine" and recorded["epochs"] != opt.epochs:
        raise InputError(
            f"--schedule cosine of {recorded['epochs']} epochs cannot go on with --epochs {opt.epochs}: use the "
            "same, or another --name for a new run"
        )
    names = [
        name for name in ("device", "amp", "teacher_views", "compile", "graph") if getattr(opt, name, None) == "auto"
    ]
    opt = copy.copy(opt)
    for name in names:
        setattr(opt, name, "auto" if name in without() else (recorded or {}).get(name, "auto"))
    spares({"compile", "graph"}.intersection(names))
    check_machine(opt)
    opt.processes = distributed.count()  # it counts: each has batch norm's statistics of its own share
    opt.device = resolve_device(opt.device)
    opt.amp = resolve_amp(opt.amp, opt.device)
    if getattr(opt, "sync_bn", False) and opt.compile == "auto":
        opt.compile = "off"  # its exchange in every layer is not compiled
    if getattr(opt, "teacher_views", None) is not None:
        opt.teacher_views = resolve_teacher_views(opt.teacher_views, opt.device, views)
    if hasattr(opt, "compile"):
        used = images - round(images * (getattr(opt, "holdout", None) or 0))
        steps = min(-(-used // opt.batch_size), opt.max_steps or math.inf)
        opt.compile = resolve_compile(opt.compile, opt.device, opt.epochs * steps)
    if hasattr(opt, "graph"):
        opt.graph = resolve_graph(opt)
    if names:
        print("auto: " + ", ".join(f"{name} {getattr(opt, name)}" for name in names))
    if opt.device == "cpu":
        keep_freed_memory()
    return opt
