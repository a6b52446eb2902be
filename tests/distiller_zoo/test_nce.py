import itertools

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.NCE import NCELoss, nce_loss

TARGET = torch.tensor([0, 1, 0, 2, 1, 1])


def embeddings(batch: int = 6, dim: int = 5) -> tuple[Tensor, Tensor]:
    f_s, f_t = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return f_s, f_t


def slow_loss(f_s: Tensor, f_t: Tensor, target: Tensor, temperature: float) -> float:
    """Student by student, with the Euclidean distances of the release in place of cosines."""
    s, t = (f.numpy() / np.linalg.norm(f.numpy(), axis=1, keepdims=True) for f in (f_s, f_t))
    losses = []
    for i in range(len(s)):
        p = softmax([(1 - np.sum((s[i] - row) ** 2) / 2) / temperature for row in t])
        same = (target == target[i]).numpy()
        attract, repel = -np.log(p + 1e-10)[same], -np.log(1 - p + 1e-10)[~same]
        losses.append(attract.mean() + (repel.mean() if len(repel) else 0))
    return np.mean(losses)


def test_it_is_the_releases_in_value_and_gradient(losses):
    check_golden(losses, "nce[temperature=0.1]", NCELoss(0.1), "f_s", "f_t", "target")


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1])
@pytest.mark.parametrize("target", [TARGET, torch.arange(6), torch.tensor([7, -1, -1, 7, 7, 7])])
def test_it_is_the_releases_formula_student_by_student(temperature, target):
    f_s, f_t = embeddings()
    expected = slow_loss(f_s, f_t, target, temperature)
    assert nce_loss(f_s, f_t, target, temperature).item() == pytest.approx(expected, rel=1e-11)


def test_its_gradients_are_its_derivatives():
    f_s, f_t = (f.requires_grad_() for f in embeddings())
    assert torch.autograd.gradcheck(lambda s, t: nce_loss(s, t, TARGET, 0.5), (f_s, f_t))


def test_the_order_of_the_batch_the_classes_names_and_a_samples_scale_do_not_matter():
    f_s, f_t = embeddings()
    value = nce_loss(f_s, f_t, TARGET)
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    torch.testing.assert_close(nce_loss(f_s[order], f_t[order], TARGET[order]), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(nce_loss(f_s, f_t, 50 - TARGET), value, rtol=0, atol=0)
    scale = torch.arange(1, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(nce_loss(f_s * scale, f_t / scale, TARGET), value, rtol=1e-12, atol=0)
    assert not torch.isclose(nce_loss(f_s, f_t, TARGET[order]), value)


@pytest.mark.parametrize("batch", [1, 6])
def test_one_class_in_the_batch_only_attracts(batch):
    f_s, f_t = embeddings(batch)
    target = torch.full((batch,), 3)
    assert nce_loss(f_s, f_t, target).item() == pytest.approx(slow_loss(f_s, f_t, target, 0.1), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1e-3])
def test_degenerate_batches_are_finite(dtype, temperature):
    """At the low temperature probabilities are 0 and 1."""
    f_s, f_t = (f.to(dtype) for f in embeddings())
    dead, constant, zero = f_s.clone(), torch.full_like(f_s, 3.7), torch.zeros_like(f_s)
    dead[2] = 0
    for a, b in itertools.product((f_s, dead, constant, zero), (f_t, dead, constant, zero)):
        for target in (TARGET, torch.zeros_like(TARGET)):
            check_finite(lambda s, t, target=target: nce_loss(s, t, target, temperature), a, b)


def test_a_zero_row_gets_no_gradient():
    f_s, f_t = embeddings()
    f_s[2] = 0
    f_s.requires_grad_()
    nce_loss(f_s, f_t, TARGET).backward()
    assert (f_s.grad[2] == 0).all()
    assert (f_s.grad[[0, 1, 3, 4, 5]] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(dtype):
    f_s, f_t = (f.to(dtype) for f in embeddings())
    expected = nce_loss(f_s.float(), f_t.float(), TARGET)
    assert torch.equal(nce_loss(f_s, f_t, TARGET), expected)
    assert torch.equal(nce_loss(f_s, f_t.float(), TARGET), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(nce_loss(f_s.float(), f_t.float(), TARGET), expected)


@pytest.mark.parametrize(
    "shapes", [((6, 8), (5, 8), (6,)), ((6, 8), (6, 9), (6,)), ((6, 8), (6, 8), (5,)), ((6,),) * 3]
)
def test_other_shapes_are_refused(shapes):
    f_s, f_t, target = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"targets \(B,\), got"):
        nce_loss(f_s, f_t, target)
