"""The measures against their definitions, written down as they stand in the papers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score

from evaluation import measures
from helper.agreement import linear_cka
from helper.util import accuracy


@pytest.fixture(scope="module")
def logits():
    """The logits of a student and its teacher, for 200 samples and 7 classes, and the targets."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(200, 7, generator=generator)
    student = teacher + torch.randn(200, 7, generator=generator)
    return student, teacher, torch.randint(7, (200,), generator=generator)


def test_calibration_error_of_every_bin(logits):
    student, _, targets = logits
    probabilities = np.exp(student.double().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets.numpy()
    expected = 0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert measures.calibration_error(student, targets) == pytest.approx(100 * expected, rel=1e-9)


def test_calibration_of_the_certain_and_of_the_honest():
    certain = torch.tensor([[1000.0, 0.0]] * 4)
    assert measures.calibration_error(certain, torch.tensor([0, 0, 0, 1])) == pytest.approx(25)
    honest = torch.log(torch.tensor([[0.75, 0.25]] * 4))
    assert measures.calibration_error(honest, torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-5)


def test_confusion_and_accuracy_by_class(logits):
    student, _, targets = logits
    targets = targets.clamp(max=5)  # none of the last class
    predicted = student.argmax(1)
    matrix = measures.confusion(predicted, targets, 7)
    assert matrix.tolist() == confusion_matrix(targets, predicted, labels=range(7)).tolist()
    found = measures.by_name(list("abcdefg"), measures.per_class_accuracy(matrix))
    expected = recall_score(targets, predicted, labels=range(6), average=None)
    assert [found[name] for name in "abcdef"] == pytest.approx((100 * expected).tolist())
    assert found["g"] is None


def test_of_equal_logits_the_same_class_counts_everywhere():
    """topk and argmax may take different ones of ties."""
    tied = torch.randint(3, (500, 10), generator=torch.Generator().manual_seed(0)).float()
    targets = torch.arange(500) % 10
    matrix = measures.confusion(tied.argmax(dim=1), targets, 10)
    top1, _ = accuracy(tied, targets, topk=(1, 5))
    assert float(measures.per_class_accuracy(matrix).mean()) == pytest.approx(float(top1))


def test_divergence_and_same_predictions(logits):
    student, teacher, _ = logits
    p_s, p_t = student.double().softmax(1), teacher.double().softmax(1)
    expected = np.mean([sum(t * np.log(t / s)) for s, t in zip(p_s.numpy(), p_t.numpy(), strict=True)])
    assert measures.divergence(student, teacher) == pytest.approx(expected)
    assert measures.divergence(teacher, teacher) == 0
    same = np.mean([s.argmax() == t.argmax() for s, t in zip(p_s.numpy(), p_t.numpy(), strict=True)])
    assert measures.same_predictions(student, teacher) == pytest.approx(100 * same)


@pytest.mark.parametrize("count", [5, 40])  # fewer than dimensions, and more
def test_alignment_errors_are_root_mean_squares_of_correlations(count):
    generator = torch.Generator().manual_seed(1)
    f_s, f_t = torch.randn(2, count, 12, generator=generator)
    correlations = np.corrcoef(f_t.numpy(), f_s.numpy())
    e_t, e_s, n_ts = correlations[:count, :count], correlations[count:, count:], correlations[:count, count:]
    node, edge = measures.alignment_errors(f_s, f_t)
    assert node == pytest.approx(np.sqrt(np.mean((n_ts - np.eye(count)) ** 2)), rel=1e-5)
    assert edge == pytest.approx(np.sqrt(np.mean((e_t - e_s) ** 2)), rel=1e-5)
    assert measures.alignment_errors(f_s, f_s)[1] == 0


@pytest.mark.parametrize("batch_size", [8, 100], ids=["batches, the last left out", "all in one"])
def test_embedding_graphs_are_correlations_of_pairs_batch_by_batch(batch_size):
    generator = torch.Generator().manual_seed(1)
    f_s, f_t = torch.randn(2, 30, 6, generator=generator)
    targets = torch.randint(4, (30,), generator=generator)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    size = min(batch_size, 30)
    found: dict[str, list] = {name: [] for name in ("node", "edge", "itself", "same_class", "other_classes")}
    for batch in range(30 // size):
        rows = order[batch * size : (batch + 1) * size]
        node = edge = 0.0
        for i in rows:
            for j in rows:
                n, e_t, e_s = (np.corrcoef(a[i], b[j])[0, 1] for a, b in ((f_t, f_s), (f_t, f_t), (f_s, f_s)))
                node, edge = node + (n - (i == j)) ** 2, edge + (e_t - e_s) ** 2
                pair = "itself" if i == j else "same_class" if targets[i] == targets[j] else "other_classes"
                found[pair].append(n)
        found["node"].append(np.sqrt(node))
        found["edge"].append(np.sqrt(edge))
    expected = {name: np.mean(values) for name, values in found.items()}
    expected["other_classes"] = np.sqrt(np.mean(np.square(found["other_classes"])))
    assert measures.embedding_graph(f_s, f_t, targets, batch_size) == pytest.approx(expected, rel=1e-5)


def test_embedding_graphs_of_a_teacher_with_itself_of_nothing_in_common_and_of_pairs_that_there_are_not():
    f_t = torch.eye(8).repeat(1, 2)  # no two of them alike
    found = measures.embedding_graph(f_t, f_t, torch.arange(8), 8)
    assert found["itself"] == pytest.approx(1) and found["edge"] == 0
    assert found["node"] == pytest.approx(np.sqrt(8 * 7) / 7) and found["same_class"] is None
    found = measures.embedding_graph(torch.ones(8, 16), f_t, torch.zeros(8, dtype=torch.long), 8)
    assert found["node"] == pytest.approx(np.sqrt(8)) and found["itself"] == 0 and found["other_classes"] is None


def test_cka_is_the_kernels_alignment_and_knows_rotations():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 6, generator=generator), torch.randn(30, 9, generator=generator)
    centre = np.eye(30) - 1 / 30
    k, m = (centre @ (f.double() @ f.double().T).numpy() @ centre for f in (x, y))
    expected = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert linear_cka(x, y) == pytest.approx(expected)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
