"""A training step recorded once and replayed, as a CUDA graph."""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from . import distributed
from .bank import EmbeddingBank


def step_capture(opt: argparse.Namespace, teacher: nn.Module | None, waits: bool = False) -> Callable | None:
    """How a training step is captured, or None where it is not: with ``--compile on``, on CUDA, in one process.

    Nor is it where the method waits for the device, with a bank that did not fit on the GPU, and with a CLIP that
    encodes every batch, which gains nothing.
    """
    embed = getattr(teacher, "embed", None)
    on_device = embed is None or (isinstance(embed, EmbeddingBank) and embed.rows.is_cuda)
    able = not waits and opt.device == "cuda" and opt.compile == "on" and distributed.count() == 1
    return cuda_graph if able and on_device else None


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that a function launches, without running them; the result launches them all at once.

    Raises:
        RuntimeError: one of them cannot be recorded; what comes next runs as if nothing had been tried.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            function()
    except BaseException:
        # PyTorch stays on the recording's stream, and its generator believes that it is still being recorded.
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay
