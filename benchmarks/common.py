"""Shared parts of the benchmarks: the machine's name, timing, memory, Markdown rows."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from helper.util import processor


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str = "cpu") -> str:
    """Processor, cores and memory, the GPU where it is used, PyTorch's release and its threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [processor(), f"{cores()} cores", f"{memory:.0f} GiB"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    return f"{', '.join(parts)}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads"


def available_memory(device: str = "cpu") -> float:
    """Bytes that can still be allocated; infinite where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def now(device: str = "cpu") -> float:
    """The time in seconds, once the device has done everything that was begun on it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(
    functions: Iterable[Callable[[], object]], budget: float, device: str = "cpu", repeats: int = 3, warm: bool = False
) -> list[float]:
    """Median time of a call of each function, after one call that does not count.

    The functions take turns, so that other work on the machine slows all of them alike.

    Args:
        functions: the functions to time.
        budget: seconds to spend on all of them together.
        repeats: at least so many calls of each, whatever the budget.
        warm: each turn begins with a call that does not count. Memory and caches are then as the function itself leaves
            them, as if it were called again and again, and not as the others do.
    """
    functions = list(functions)
    start = now(device)
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    while len(times[0]) < repeats or now(device) - start < budget:
        for function, measured in zip(functions, times, strict=True):
            if warm:
                function()
            begin = now(device)
            function()
            measured.append(now(device) - begin)
    return [statistics.median(measured) for measured in times]


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes of tensors that a call holds at one time, without those that were there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def three_digits(value: float) -> str:
    """Rounded to three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):g}"


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Markdown rows; the first column is text, the others are numbers."""
    header = list(header)
    print("| " + " | ".join(header) + " |")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()
