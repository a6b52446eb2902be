import numpy as np
import pytest
import torch

from helper.util import AverageMeter, accuracy, format_seconds


def test_a_meter_averages_over_samples_not_over_batches():
    meter = AverageMeter()
    for values, n in (([1.0, 10.0], 64), ([4.0, 40.0], 32)):
        meter.update(torch.tensor(values), n)
    assert meter.avg.tolist() == [2.0, 20.0]
    meter.reset()
    meter.update(3.0)
    assert (meter.avg, meter.count) == (3.0, 1)


def test_accuracy_counts_targets_among_the_highest():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(200, 10)), rng.integers(0, 10, 200)
    rank = (np.argsort(-logits, axis=1) == targets[:, None]).argmax(axis=1)
    top1, top5, top10 = accuracy(torch.from_numpy(logits), torch.from_numpy(targets), topk=(1, 5, 10))
    assert top1.item() == pytest.approx(100 * (rank < 1).mean())
    assert top5.item() == pytest.approx(100 * (rank < 5).mean())
    assert top10 == 100


def test_fewer_classes_than_k_count_all():
    assert accuracy(torch.eye(3), torch.tensor([1, 2, 0]), topk=(1, 5)) == [0, 100]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (90_061, "25:01:01")],
)
def test_seconds_are_written_as_a_clock_does(seconds, text):
    assert format_seconds(seconds) == text
