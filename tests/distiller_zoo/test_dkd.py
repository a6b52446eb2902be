import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from conftest import check_finite, check_golden
from distiller_zoo.DKD import DKD, dkd_loss, dkd_terms
from distiller_zoo.KD import kd_loss


def inputs(batch: int = 6, classes: int = 7, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logit_s, logit_t = torch.randn(2, batch, classes, generator=generator, dtype=torch.float64) * scale
    return logit_s, logit_t, torch.randint(classes, (batch,), generator=generator)


def slow_terms(logit_s, logit_t, target, T: float) -> tuple[float, float]:
    """Both divergences sample by sample, of probabilities."""
    tckd, nckd = [], []
    for z_s, z_t, label in zip(logit_s.numpy(), logit_t.numpy(), target.tolist(), strict=True):
        p_s, p_t = softmax(z_s / T), softmax(z_t / T)
        tckd.append(entropy([p_t[label], 1 - p_t[label]], [p_s[label], 1 - p_s[label]]))
        nckd.append(entropy(np.delete(p_t, label), np.delete(p_s, label)))  # entropy() normalises
    return np.mean(tckd) * T**2, np.mean(nckd) * T**2


def test_it_is_the_published_one_in_value_and_gradient(losses):
    check_golden(losses, "dkd[alpha=1,beta=8,T=4]", dkd_loss, "logit_s", "logit_t", "target")
    check_golden(losses, "dkd[alpha=1,beta=8,T=4]", DKD(), "logit_s", "logit_t", "target")


@pytest.mark.parametrize("T", [0.5, 1, 4])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_its_terms_are_the_divergences_of_target_against_rest_and_within_the_rest(T, classes):
    args = inputs(classes=classes)
    tckd, nckd = dkd_terms(*args, T)
    expected_tckd, expected_nckd = slow_terms(*args, T)
    assert tckd.item() == pytest.approx(expected_tckd, rel=1e-10)
    assert nckd.item() == pytest.approx(expected_nckd, rel=1e-10, abs=1e-15)
    assert (nckd == 0) == (classes == 2)  # a single other class has nothing to share


def test_weighed_by_what_the_teacher_leaves_to_the_rest_it_is_the_usual_divergence():
    """The paper's decomposition: KD = target part + (1 - p_t of the target) * non-target part, sample by sample."""
    logit_s, logit_t, target = inputs()
    T = 2.0
    total = 0
    for i in range(len(target)):
        row = slice(i, i + 1)
        tckd, nckd = dkd_terms(logit_s[row], logit_t[row], target[row], T)
        total += tckd + (1 - (logit_t[i] / T).softmax(0)[target[i]]) * nckd
    torch.testing.assert_close(total / len(target), kd_loss(logit_s, logit_t, T), rtol=1e-12, atol=0)


def test_its_weights_weigh_and_its_terms_sum_up():
    args = inputs()
    tckd, nckd = dkd_terms(*args, 3.0)
    loss = DKD(alpha=2, beta=0.5, T=3.0)
    assert loss.terms(*args) == {"tckd": 2 * tckd, "nckd": 0.5 * nckd}
    assert torch.equal(sum(loss.terms(*args).values()), loss(*args))
    assert torch.equal(loss(*args), dkd_loss(*args, alpha=2, beta=0.5, T=3.0))


def test_its_gradients_are_its_derivatives():
    logit_s, logit_t, target = inputs(3, 4)
    logit_s.requires_grad_()
    logit_t.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: dkd_loss(s, t, target, T=2.0), (logit_s, logit_t))


def test_equal_logits_have_neither_loss_nor_gradient():
    logit_s, _, target = inputs()
    logit_s.requires_grad_()
    value = dkd_loss(logit_s, logit_s.detach().clone(), target)
    value.backward()
    assert value == 0
    assert logit_s.grad.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", [0, 1])
def test_certain_teachers_and_students_are_finite(dtype, which):
    """Probabilities of 0 and 1, for the target and for another class, on either side and on both."""
    logit_s, logit_t, target = inputs(4, 5)
    certain = torch.zeros(4, 5, dtype=torch.float64)
    certain[torch.arange(4), (target + torch.tensor([0, 0, which, 1])) % 5] = 1e4
    for pair in ((certain, logit_t), (logit_s, certain), (certain, certain), (certain, -certain)):
        check_finite(dkd_loss, *(logit.to(dtype) for logit in pair), target)


def test_a_certain_students_loss_is_not_cut_off():
    """The student is certain of the other class, by 1000 in the logits: so large is its divergence from even odds."""
    logit_s, logit_t = torch.tensor([[0.0, 1000.0]]), torch.zeros(1, 2)
    tckd, _ = dkd_terms(logit_s, logit_t, torch.tensor([0]), T=1.0)
    assert tckd.item() == pytest.approx(500 - np.log(2))


@pytest.mark.parametrize("batch", [1, 5])
def test_constant_rows_one_class_in_the_batch_and_a_batch_of_one_are_finite(batch):
    logit_s, logit_t, _ = inputs(batch, 5)
    target = torch.zeros(batch, dtype=torch.int64)
    check_finite(dkd_loss, logit_s, logit_t, target)
    check_finite(dkd_loss, torch.full_like(logit_s, 3), logit_t, target)
    check_finite(dkd_loss, torch.zeros_like(logit_s), torch.zeros_like(logit_t), target)


def test_half_precision_is_computed_in_float32():
    logit_s, logit_t, target = inputs()
    logit_s, logit_t = logit_s.bfloat16(), logit_t.bfloat16()
    assert torch.equal(dkd_loss(logit_s, logit_t, target), dkd_loss(logit_s.float(), logit_t.float(), target))


@pytest.mark.parametrize("shapes", [((4, 5), (4, 6)), ((4, 5), (3, 5)), ((4, 1), (4, 1)), ((5,), (5,))])
def test_other_shapes_are_refused(shapes):
    logit_s, logit_t = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"DKD needs logits of one shape.*got \(\d.* and \(\d"):
        dkd_loss(logit_s, logit_t, torch.zeros(4, dtype=torch.int64))
