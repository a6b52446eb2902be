"""Averages and accuracies, and a time in words."""

from torch import Tensor


class AverageMeter:
    """Keeps a running average; of a vector too, which stays on its device until it is read."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: float | Tensor, n: int = 1) -> None:
        """Add a value that is the mean of ``n`` samples."""
        self.val = val
        self.sum = self.sum + val * n
        self.count += n
        self.avg = self.sum / self.count


def predicted_class(output: Tensor) -> Tensor:
    """The class that ``accuracy`` takes for the network's answer: of equal logits, as bf16 has them, only one is.

    Args:
        output: logits, (B, classes).
    """
    return _highest(output, 5)[:, 0]  # not argmax, nor a smaller k, which may take another one of them


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Percentage of samples whose target is among the k highest logits, for each k.

    Args:
        output: logits, (B, classes).
        target: (B,) classes.
        topk: each k; one above the number of classes counts all of them.
    """
    correct = _highest(output, max(topk)) == target[:, None]
    return [100.0 * correct[:, :k].any(dim=1).float().mean() for k in topk]


def _highest(output: Tensor, k: int) -> Tensor:
    return output.topk(min(k, output.shape[1]), dim=1).indices


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
