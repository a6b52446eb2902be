import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr

from conftest import check_finite, check_golden
from distiller_zoo.DIST import DIST, dist_loss, dist_terms


def logits(batch: int = 6, classes: int = 5, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(2, batch, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


def test_it_is_the_published_one_in_value_and_gradient(losses):
    check_golden(losses, "dist[beta=1,gamma=1]", dist_loss, "logit_s", "logit_t")
    check_golden(losses, "dist[beta=1,gamma=1]", DIST(), "logit_s", "logit_t")


@pytest.mark.parametrize("T", [1, 4])
def test_its_terms_are_correlations_row_by_row_and_column_by_column(T):
    logit_s, logit_t = logits()
    p_s, p_t = (softmax(logit.numpy() / T, axis=1) for logit in (logit_s, logit_t))
    inter, intra = dist_terms(logit_s, logit_t, T)
    rows = [pearsonr(a, b)[0] for a, b in zip(p_s, p_t, strict=True)]
    columns = [pearsonr(a, b)[0] for a, b in zip(p_s.T, p_t.T, strict=True)]
    # The publication's epsilon, 1e-8 beside a product of norms, shows in the seventh digit.
    assert inter.item() == pytest.approx(T**2 * (1 - sum(rows) / 6), rel=1e-5)
    assert intra.item() == pytest.approx(T**2 * (1 - sum(columns) / 5), rel=1e-5)


def test_its_weights_weigh_and_its_terms_sum_up():
    logit_s, logit_t = logits()
    inter, intra = dist_terms(logit_s, logit_t, 4.0)
    loss = DIST(beta=2, gamma=0.5, T=4.0)
    assert loss.terms(logit_s, logit_t) == {"inter": 2 * inter, "intra": 0.5 * intra}
    assert torch.equal(sum(loss.terms(logit_s, logit_t).values()), loss(logit_s, logit_t))
    assert torch.equal(loss(logit_s, logit_t), dist_loss(logit_s, logit_t, 2, 0.5, 4.0))


def test_its_gradients_are_its_derivatives():
    logit_s, logit_t = (logit.requires_grad_() for logit in logits(3, 4))
    assert torch.autograd.gradcheck(lambda s, t: dist_loss(s, t, 1.0, 2.0, 2.0), (logit_s, logit_t))


def test_the_order_of_samples_and_of_classes_does_not_matter_if_both_share_it():
    logit_s, logit_t = logits()
    value = dist_loss(logit_s, logit_t)
    samples, classes = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([4, 2, 0, 1, 3])
    permuted = dist_loss(logit_s[samples][:, classes], logit_t[samples][:, classes])
    torch.testing.assert_close(permuted, value, rtol=1e-12, atol=0)
    assert not torch.isclose(dist_loss(logit_s[samples], logit_t), value)


def test_equal_logits_have_almost_no_loss_and_opposite_ones_more_than_unrelated_ones():
    logit_s, logit_t = logits()
    assert dist_loss(logit_s, logit_s).item() == pytest.approx(0, abs=1e-6)
    assert dist_loss(logit_s, -logit_s) > dist_loss(logit_s, logit_t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, -30.0])
@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3, 4, 5]])
def test_a_constant_row_counts_as_uncorrelated_and_gets_no_gradient(dtype, level, rows):
    """A student that gives every class the same probability, as one does that starts at zero."""
    logit_s, logit_t = logits().to(dtype)
    logit_s[rows] = level
    check_finite(dist_loss, logit_s, logit_t)
    check_finite(dist_loss, logit_t, logit_s)
    logit_s.requires_grad_()
    inter, _ = dist_terms(logit_s, logit_t)
    inter.backward()
    assert (logit_s.grad[rows] == 0).all()
    if len(rows) == 6:
        assert inter == 1


def test_a_column_that_is_constant_over_the_batch_counts_as_uncorrelated():
    logit_s, logit_t = logits()
    logit_s[:] = logit_s[0]  # one prediction for every sample
    check_finite(dist_loss, logit_s, logit_t)
    logit_s.requires_grad_()
    _, intra = dist_terms(logit_s, logit_t)
    intra.backward()
    assert intra == 1
    assert (logit_s.grad == 0).all()


def test_a_batch_of_one_has_the_inter_class_loss_alone():
    logit_s, logit_t = logits(1)
    check_finite(dist_loss, logit_s, logit_t)
    inter, intra = dist_terms(logit_s, logit_t, 2.0)
    p_s, p_t = (softmax(logit[0].numpy() / 2) for logit in (logit_s, logit_t))
    assert inter.item() == pytest.approx(4 * (1 - pearsonr(p_s, p_t)[0]), rel=1e-5)
    assert intra == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_teachers_and_students_are_finite(dtype):
    logit_s, logit_t = logits().to(dtype)
    certain = torch.eye(6, 5, dtype=dtype) * 1e4  # the last row is constant
    for pair in ((certain, logit_t), (logit_s, certain), (certain, certain), (certain, -certain)):
        check_finite(dist_loss, *pair)


def test_a_logit_that_is_not_a_number_shows_in_the_loss():
    logit_s, logit_t = logits()
    logit_s[2, 3] = torch.nan
    assert dist_loss(logit_s, logit_t).isnan()


def test_half_precision_is_computed_in_float32():
    logit_s, logit_t = logits().bfloat16()
    assert torch.equal(dist_loss(logit_s, logit_t), dist_loss(logit_s.float(), logit_t.float()))


@pytest.mark.parametrize("shapes", [((4, 5), (4, 6)), ((4, 5), (3, 5)), ((5,), (5,))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"DIST needs logits of one shape.*got \(\d.* and \(\d"):
        dist_loss(*(torch.zeros(shape) for shape in shapes))
