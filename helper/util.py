"""Averages and accuracies; a time and this processor in words."""

import platform
from pathlib import Path

from torch import Tensor

# Instructions that decide a processor's speed at bf16, fp32 and 8 bits: Linux's name for them, and the common one.
_INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512-BF16",
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


class AverageMeter:
    """Keeps a running average of numbers or of tensors, which stay on their device until they are read."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.avg = self.sum = self.count = 0

    def update(self, val: float | Tensor, n: int = 1) -> None:
        """Add a value that is the mean of ``n`` samples."""
        self.sum = self.sum + val * n
        self.count += n
        self.avg = self.sum / self.count


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Percentage of samples with their target among the k highest logits, for each k.

    Args:
        output: logits, (B, classes).
        target: (B,) classes.
        topk: each k; a k above the number of classes counts all classes.
    """
    highest = {k: output.topk(min(k, output.shape[1]), dim=1).indices for k in topk if k > 1}
    highest[1] = output.argmax(dim=1, keepdim=True)
    return [100.0 * (highest[k] == target[:, None]).any(dim=1).float().mean() for k in topk]


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def processor() -> str:
    """The processor's name, and which of its instructions decide how fast it computes."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        about = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
        flags = about["flags"].split()
        has = dict.fromkeys(name for flag, name in _INSTRUCTIONS.items() if flag in flags)
        return about["model name"].strip() + (f" ({', '.join(has)})" if has else "")
    except (OSError, KeyError):  # not Linux, or a processor that is described otherwise
        return platform.processor() or platform.machine()
