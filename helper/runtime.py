"""Where and how a run computes: device, precision, compilation; every ``auto`` is resolved here, once."""

import argparse
import contextlib
import copy
import ctypes
import math
import os
import shutil

import torch

from dataset.views import CIFAR_VIEWS, Views
from distiller_zoo import METHODS
from errors import InputError

from . import distributed
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


def resolve_device(device: str) -> str:
    """'cpu' or 'cuda'; on a GPU, PyTorch then chooses convolutions by trying them.

    Raises:
        InputError: cuda is asked for, but this machine has no GPU, or fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        InputError: compilation is asked for, but there is no compiler: C++'s for a CPU, C's for CUDA.
    """
    # Inductor and Triton look for it in this way.
    variable, *names = ("CC", "gcc", "clang") if device == "cuda" else ("CXX", "g++")
    named = [os.environ[variable]] if variable in os.environ else names
    able = any(shutil.which(name) is not None for name in named)
    if compile_ == "on" and not able:
        raise InputError(
            f"--compile on needs a compiler ({names[0]}, or the one that {variable} names); install one or use off"
        )
    if compile_ == "auto":
        faster = device == "cuda" or torch.cpu._is_amx_tile_supported()
        return "on" if able and faster and steps >= COMPILE_PAYS_AFTER_STEPS else "off"
    return compile_


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
        return "off" if opt.graph == "off" else "on"
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
        setattr(opt, name, (recorded or {}).get(name, "auto"))
    opt.processes = distributed.count()  # it counts: each has batch norm's statistics of its own share
    opt.device = resolve_device(opt.device)
    opt.amp = resolve_amp(opt.amp, opt.device)
    if opt.batch_size < opt.processes:
        raise InputError(f"--batch_size {opt.batch_size} is less than a sample for each of {opt.processes} processes")
    if getattr(opt, "sync_bn", False) and opt.device != "cuda":
        raise InputError("--sync_bn needs --device cuda: PyTorch's SyncBatchNorm has no CPU version")
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
