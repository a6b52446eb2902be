"""A GPU for machines without one, for the tests: its tensors say that they are on it and refuse what CUDA refuses.

A process of its own imports this project with the word cuda replaced by the device's name, PyTorch's PrivateUse1
backend. A tensor there wraps one on the CPU, which computes. An operation on tensors of both kinds fails, as do reading
one as numpy's and pinning it. On one stream an operation fails that uses what another stream may not have written yet.
In what is captured, whatever waits for the device or copies from or to it fails. A captured graph does the recorded
operations again. What it cannot show: speed, memory, CUDA's own kernels, autocast (nothing is cast) and compilation
(nothing is compiled).
"""

import contextlib
import functools
import gc
import importlib
import importlib.machinery
import multiprocessing
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "gpu"
ROOT = Path(__file__).parents[1]

# What makes the host wait for a GPU, or copies what the host has just made to it: neither can be captured.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "equal", "lift_fresh", "_linalg_svd", "_linalg_eigh", "linalg_inv_ex",
}  # fmt: skip
MOVES = {"_to_copy", "copy_"}
PINS = {"_pin_memory", "pin_memory"}
INDEXING = {"index", "index_put", "index_put_"}


class GpuTensor(torch.Tensor):
    """Says that it is on the device; ``inner``, on the CPU, has its numbers."""

    @staticmethod
    def __new__(cls, inner):
        facts = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=f"{NAME}:0", **facts)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        made = GpuTensor(self.inner.clone())
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    def __reduce_ex__(self, protocol):  # in a file, as what is loaded onto the CPU
        return self.inner.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    def record_stream(self, stream):
        assert stream is current_stream()

    def numpy(self):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")


class Event:
    """What the streams had done when it was recorded."""

    def record(self, stream=None):
        stream = stream or current_stream()
        self.done = stream.seen | {stream: stream.done}

    def synchronize(self):
        current_stream().wait_event(self)
        while UNDER_WAY:
            UNDER_WAY.pop(0)()


class Stream:
    """Counts its operations, and knows how many of each other stream's are done before its next one."""

    waited = 0

    def __init__(self):
        self.done, self.seen = 0, {}

    def record_event(self):
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event):
        Stream.waited += 1
        self.seen |= {stream: max(done, self.seen.get(stream, 0)) for stream, done in event.done.items()}

    def wait_stream(self, other):
        self.wait_event(other.record_event())


# Copies to the host that nobody has waited for.
UNDER_WAY = []

DEFAULT = Stream()
ON = {"stream": DEFAULT}  # of the main thread, and of autograd's
own = threading.local()  # a reading thread's

# The stream and the number of the operation that last wrote to a memory, by address.
written: dict[int, tuple[Stream, int]] = {}


def current_stream() -> Stream:
    return getattr(own, "on", ON)["stream"]


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    on, before = getattr(own, "on", ON), current_stream()
    on["stream"] = stream
    try:
        yield
    finally:
        on["stream"] = before


def check_written(tensors: list) -> None:
    stream = current_stream()
    for x in tensors:
        by, number = written.get(x.inner.untyped_storage().data_ptr(), (stream, 0))
        if by is not stream and stream.seen.get(by, 0) < number:
            raise RuntimeError("a stream uses what another one may not have written yet")


def note_written(tensors: list) -> None:
    stream = current_stream()
    stream.done += 1
    written.update((x.inner.untyped_storage().data_ptr(), (stream, stream.done)) for x in tensors)


def tensors_in(*trees) -> list[torch.Tensor]:
    """Every tensor of an operation's arguments or results, in order."""
    found = []  # PyTorch's own pytree takes three times as long
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, (list, tuple)):
            found += tensors_in(*tree)
        elif isinstance(tree, dict):
            found += tensors_in(*tree.values())
    return found


def replaced(function: Callable, tree):
    """The same arguments or results with ``function(x)`` in the place of every tensor x."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([replaced(function, x) for x in tree])
    if isinstance(tree, dict):
        return {key: replaced(function, x) for key, x in tree.items()}
    return tree


@functools.cache
def changed_arguments(function) -> list[tuple[int, str]]:
    """Place and name of each argument that an operation changes in place."""
    arguments = enumerate(function._schema.arguments)
    return [(place, x.name) for place, x in arguments if x.alias_info is not None and x.alias_info.is_write]


def waits(name: str, args: tuple) -> bool:
    """Whether an operation makes the host wait; a mask's size is known to the device alone."""
    masks = name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1]))
    return name in WAITING or masks


def on_gpu(x: torch.Tensor) -> bool:
    return isinstance(x, GpuTensor)


def check(name: str, args: tuple, kwargs: dict) -> None:
    """Raise a RuntimeError where CUDA would."""
    found = tensors_in(args, kwargs)
    if name in PINS and any(map(on_gpu, found)):
        raise RuntimeError("cannot pin a tensor of the device: only dense CPU tensors can be pinned")
    if name in MOVES or not any(map(on_gpu, found)):
        return
    if name in INDEXING and on_gpu(args[0]):
        found = tensors_in(args[0], args[2:])  # row numbers may be on either
    if any(not on_gpu(x) and x.dim() for x in found):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME}:0 and cpu")


def compute(function, args: tuple, kwargs: dict):
    """What an operation gives, on the device where its arguments or its ``device`` are."""
    name = function.overloadpacket.__name__
    check(name, args, kwargs)
    if name == "is_pinned":
        return False
    if name in PINS:
        return args[0].clone()
    used = [x for x in tensors_in(args, kwargs) if on_gpu(x)]
    check_written(used)
    gpu = bool(used)
    inner_args, inner_kwargs = replaced(lambda x: x.inner if on_gpu(x) else x, (args, kwargs))
    if kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    if kwargs.get("device") is not None:
        gpu = torch.device(kwargs["device"]).type == NAME
        inner_kwargs["device"] = torch.device("cpu")
    elif name == "copy_":
        gpu = on_gpu(args[0])
    if name == "copy_" and used and not gpu and (kwargs.get("non_blocking") or True in args[2:]):
        UNDER_WAY.append(lambda: function(*inner_args, **inner_kwargs))
        return args[0].fill_(-1)
    result = function(*inner_args, **inner_kwargs)
    if not gpu:
        return result
    wrapped = {id(x): GpuTensor(x) for x in tensors_in(result)}
    for place, name in changed_arguments(function):  # what was changed in place is given back itself
        given = args[place] if place < len(args) else kwargs.get(name)
        wrapped |= {id(x.inner): x for x in tensors_in(given) if on_gpu(x)}
    note_written(list(wrapped.values()))
    return replaced(lambda x: wrapped[id(x)], result)


class Gpu(TorchDispatchMode):
    """Sees the operations that no tensor of the device takes part in, such as those that make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Graph:
    """In the place of ``torch.cuda.CUDAGraph``: does recorded operations again, without the Python around them.

    What was there before is used again as it is then, what was made is made anew; numbers stay what they were. Unlike
    CUDA's, a recording does what it records: the first replay is then left out.
    """

    captures = 0

    def __init__(self):
        self.operations: list[tuple] | None = []
        self.recorded = False

    def replay(self):
        if not self.recorded:
            self.recorded = True
            return
        made = {}
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                args, kwargs = replaced(lambda x, made=made: made.get(id(x), x), (args, kwargs))
                again = function(*args, **kwargs)
                made |= {id(old): new for old, new in zip(tensors_in(result), tensors_in(again), strict=True)}


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        result = function(*args, **kwargs)
        places = {on_gpu(x) for x in tensors_in(args, kwargs, result)}
        if waits(name, args) or name in PINS or (name in MOVES and len(places) > 1):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        self.graph.operations.append((function, args, kwargs, result))
        return result


@contextlib.contextmanager
def record(graph: Graph, stream: Stream | None = None) -> Iterator[None]:
    """On a stream that must have run before, as the steps before a recording have to."""
    assert stream is None or stream.done, "the steps before the recording ran on another stream"
    stream, outside = stream or current_stream(), current_stream()
    stream.wait_stream(outside)  # PyTorch waits for all streams
    with Recorder(graph), on_stream(stream):
        yield
    outside.wait_stream(stream)  # for what CUDA would not have done yet
    Graph.captures += 1  # of those that did not fail


class Device(types.ModuleType):
    """In the place of ``torch.cuda``."""

    free = 0
    CUDAGraph, graph = Graph, staticmethod(record)
    Stream, Event, stream, current_stream = Stream, Event, staticmethod(on_stream), staticmethod(current_stream)
    get_rng_state, set_rng_state = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)

    def mem_get_info(self, *args):
        return self.free, 2**40

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def _give(value):
        return lambda self, *args, **kwargs: value

    device_count = _give(1)
    current_device = _give(0)
    is_available = is_initialized = is_bf16_supported = _give(True)
    _is_in_bad_fork = is_current_stream_capturing = _give(False)
    set_device = synchronize = manual_seed_all = reset_peak_memory_stats = _give(None)
    memory_allocated, max_memory_allocated, get_device_name = _give(0), _give(2**20), _give("a pretended GPU")


class Renaming(importlib.machinery.SourceFileLoader):
    """Imports this project's files as if CUDA were called otherwise."""

    def get_code(self, fullname: str):
        source = Path(self.get_filename(fullname)).read_text()
        for old, new in (('"cuda"', f'"{NAME}"'), ("torch.cuda", f"torch.{NAME}"), ("is_cuda", f"is_{NAME}")):
            source = source.replace(old, new)
        return compile(source.replace("'cuda'", f"'{NAME}'"), self.get_filename(fullname), "exec")


def renamed_finder(folder: str):
    if not Path(folder).resolve().is_relative_to(ROOT) or ".venv" in Path(folder).parts:
        raise ImportError
    return importlib.machinery.FileFinder(folder, (Renaming, [".py"]))


def install(device: Device) -> None:
    """The device, and this project as it would see CUDA."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, device)
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) is seen
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    device.library = library  # which ends with it
    torch.compile = lambda function: function
    run = threading.Thread.run

    def run_seen(thread):
        own.on = {"stream": DEFAULT}
        with Gpu():
            run(thread)

    threading.Thread.run = run_seen
    sys.path_hooks.insert(0, renamed_finder)
    sys.path_importer_cache.clear()
    sys.path.insert(0, str(ROOT))


def serve(pipe) -> None:
    """Runs the commands that it is sent, until it is sent None; see ``PretendGpu``."""
    torch.set_num_threads(1)
    device = Device(f"torch.{NAME}")
    install(device)
    import dataset
    import evaluation.probe
    from conftest import make_dataset
    from helper.run import Run

    made = make_dataset()
    dataset.DATASETS["tiny"] = lambda data_dir: made
    evaluation.probe._STEPS = 20  # an operation takes a hundred times as long here
    multiprocessing.set_start_method("fork", force=True)  # for a loader's workers, as in a process of one's own
    save_inside = Run.save_inside

    def save_and_stop(self, steps: int, state: dict) -> None:
        save_inside(self, steps, state)
        raise ValueError(f"stopped after step {steps}")

    while (call := pipe.recv()) is not None:
        script, argv, device.free, stop = call
        Graph.captures = 0
        Run.save_inside = save_and_stop if stop else save_inside
        try:
            with Gpu():
                importlib.import_module(script).main(argv)
            pipe.send((Graph.captures, None))
        except BaseException:
            pipe.send((Graph.captures, traceback.format_exc()))
        gc.collect()  # a run that failed still has its folder locked


def main(argv: list[str]) -> None:
    """What it refuses and what not."""
    here, there, rows = torch.ones(3), torch.ones(3, device=NAME), torch.tensor([0, 1])
    assert there.device == torch.device(f"{NAME}:0") != torch.device(NAME)
    assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert there[rows].tolist() == [1, 1]
    assert there.add_(1) is there
    refused = [
        lambda: there + here,
        lambda: here[rows.to(NAME)],
        lambda: there.index_select(0, rows),
        lambda: there.pin_memory(),
        lambda: there.numpy(),
    ]

    def on_two_streams() -> None:
        with on_stream(Stream()):
            made = there * 2
        made + there

    refused.append(on_two_streams)
    waiting = [lambda: there.sum().item(), lambda: there.copy_(here), lambda: there.cpu(), lambda: there[there > 0]]
    for function in refused + waiting:
        recording = contextlib.nullcontext() if function in refused else record(Graph())
        try:
            with recording:
                function()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError(f"{(refused + waiting).index(function)} was not refused")


class PretendGpu:
    """A process that has one."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")  # autograd keeps the devices that it has met first
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        self.process.start()

    def __call__(self, script: str, argv: list[str], free: int = 2**40, stop: bool = False) -> int:
        """Run a script; gives how many graphs it captured.

        Args:
            free: bytes of the device that are free.
            stop: let it end after its first checkpoint inside an epoch, by a ValueError.
        """
        self.pipe.send((script, argv, free, stop))
        captures, error = self.pipe.recv()
        assert error is None, error
        return captures

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join(30)
