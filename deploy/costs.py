"""What a teacher and its student cost: the reason to distil, in one table."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evaluation.student import TrainedStudent
from evaluation.teacher import open_teacher_network
from helper.util import processor
from models.encoders import FrozenEncoder
from models.heads import Classifier, TeacNet

from .export import Exported, exporter_errors, save_onnx
from .predict import open_onnx


class Cost(NamedTuple):
    """What a network costs.

    parameters: how many it has.
    mflops: operations for an image, in millions; a multiplication and an addition are two.
    megabytes: the size of its file.
    milliseconds: time for an image in batches of 1 and of 64, with onnxruntime on the CPU.
    """

    parameters: int
    mflops: float
    megabytes: float
    milliseconds: tuple[float, float]


class Row(NamedTuple):
    """A row of the table: a network's name, its accuracy (top-1, %) where it is known, and its cost."""

    name: str
    accuracy: float | None
    cost: Cost


@torch.no_grad()
def flops(network: nn.Module, image: Tensor) -> int:
    """Operations for an image (1, 3, H, W): those of convolutions and matrix products, attention's included."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention is not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def milliseconds(path: Path, image: Tensor, batch: int, seconds: float = 0.5) -> float:
    """Time for an image, with an ONNX file and batches of so many; the fastest run counts, as others share the CPU."""
    run = open_onnx(path)
    images = image.expand(batch, *image.shape[1:]).contiguous()
    run(images)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / batch


def cost(exported: Exported) -> Cost:
    """What a network costs, in its file."""
    print(f"timing {exported.onnx.name}", flush=True)
    image = exported.example[:1]
    parameters = sum(p.numel() for p in exported.network.parameters())
    times = (milliseconds(exported.onnx, image, 1), milliseconds(exported.onnx, image, 64))
    return Cost(parameters, flops(exported.network, image) / 1e6, exported.path.stat().st_size / 1e6, times)


class TeacherNetwork(nn.Module):
    """A run's teacher as one network: normalised images to logits, or without a head to embeddings.

    Args:
        network, head: see ``open_teacher_network``.
    """

    def __init__(self, network: FrozenEncoder | Classifier, head: TeacNet | None):
        super().__init__()
        self.network = network
        self.head = head if isinstance(network, FrozenEncoder) else None  # a CNN classifies by itself

    def forward(self, image: Tensor) -> Tensor:
        if isinstance(self.network, Classifier):
            return self.network(image).logits
        x = self.network.embed(image)
        return x if self.head is None else self.head(x)[1]


def teacher_rows(opened: TrainedStudent, folder: Path) -> list[Row]:
    """The row of the run's teacher, or no row where there is none; a printed line says why it cannot be measured.

    Args:
        folder: a file that is timed goes there.
    """
    if opened.run.options["distill"] == "none":
        return []
    try:
        network, head = open_teacher_network(opened.run, opened.state, len(opened.classes))
        size = network.resolution if isinstance(network, FrozenEncoder) else opened.image_size
        path = folder / "teacher.onnx"
        teacher = Exported(path, path, TeacherNetwork(network, head).eval(), torch.zeros(2, 3, size, size))
        print(f"writing {path.name}, to be timed", flush=True)
        with exporter_errors("the teacher"):
            save_onnx(teacher.network, teacher.example, path, ["output"])
    except (ValueError, OSError) as error:
        print(f"the teacher is not measured: {' '.join(str(error).split())}")
        return []
    known = opened.state.get("teacher_acc")
    return [Row(f"teacher: {opened.run.options['model_t']}", known, cost(teacher))]


def cost_table(rows: list[Row]) -> str:
    """What networks cost and how well they classify, in Markdown."""
    threads = torch.get_num_threads()
    lines = [
        "| | parameters | MFLOPs | file (MB) | ms per image, batch 1 | batch 64 | accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, accuracy, cost in rows:
        one, many = cost.milliseconds
        told = "–" if accuracy is None else f"{accuracy:.2f}"
        lines.append(
            f"| {name} | {cost.parameters:,} | {cost.mflops:,.1f} | {cost.megabytes:.2f} | {one:.3f} | {many:.3f} "
            f"| {told} |"
        )
    lines += ["", f"Times: onnxruntime on {processor()}, {threads} thread{'s' if threads > 1 else ''}."]
    lines[-1] += " A multiplication and an addition are two FLOPs."
    return "\n".join(lines)
