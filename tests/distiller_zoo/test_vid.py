import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.VID import VIDLoss, vid_loss


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def formula_vid(dtype: torch.dtype) -> VIDLoss:
    vid = VIDLoss(5, 9, 9).to(dtype)
    with torch.no_grad():
        for w in vid.regressor.parameters():
            w.copy_(0.1 * torch.sin(torch.arange(1, w.numel() + 1, dtype=torch.float64)).view_as(w))
    return vid


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "vid_mixed", lambda s, t: formula_vid(s.dtype)(s, t), "map_s_big", "map_t_small")


def test_its_weights_have_repdistillers_names_and_shapes():
    shapes = {name: tuple(w.shape) for name, w in VIDLoss(5, 7, 9).state_dict().items()}
    assert shapes == {
        "log_scale": (9,),
        "regressor.0.weight": (7, 5, 1, 1),
        "regressor.2.weight": (7, 7, 1, 1),
        "regressor.4.weight": (9, 7, 1, 1),
    }


def test_it_is_the_gaussians_negative_log_likelihood_but_for_the_constant():
    mean, target, variance = maps(2, 3, 4, 4), maps(3, 3, 4, 4)[:2], torch.tensor([0.1, 2, 30], dtype=torch.float64)
    log_pdf = norm.logpdf(target.numpy(), mean.numpy(), np.sqrt(variance.numpy()).reshape(1, 3, 1, 1))
    assert vid_loss(mean, variance, target).item() == pytest.approx(-log_pdf.mean() - np.log(2 * np.pi) / 2, rel=1e-12)


@pytest.mark.parametrize("init_pred_var", [0.1, 5.0, 100.0])
def test_the_variance_starts_where_it_is_told_to(init_pred_var):
    vid = VIDLoss(3, 4, 5, init_pred_var=init_pred_var).double()
    target = maps(2, 5, 4, 4)
    variance = torch.full((5,), init_pred_var, dtype=torch.float64)
    expected = vid_loss(vid.regressor(maps(2, 3, 4, 4)), variance, target)
    torch.testing.assert_close(vid(maps(2, 3, 4, 4), target), expected, rtol=1e-5, atol=0)


def test_the_larger_map_is_pooled_to_the_smaller():
    vid = VIDLoss(3, 4, 5).double()
    big, small = maps(2, 3, 8, 8), maps(2, 5, 4, 4)
    assert torch.equal(vid(big, small), vid(F.avg_pool2d(big, 2), small))
    big, small = maps(2, 5, 8, 8), maps(2, 3, 2, 2)
    assert torch.equal(vid(small, big), vid(small, F.avg_pool2d(big, 4)))


def test_its_gradients_are_its_derivatives():
    vid = VIDLoss(2, 3, 2).double()
    student, teacher = maps(2, 2, 3, 3).requires_grad_(), (maps(2, 2, 3, 3) + 1).requires_grad_()
    assert torch.autograd.gradcheck(vid, (student, teacher))
    assert torch.autograd.gradcheck(lambda scale: vid_loss(student, F.softplus(scale), teacher), vid.log_scale)


def test_all_its_weights_are_trained():
    vid = VIDLoss(3, 4, 5)
    vid(maps(4, 3, 4, 4).float(), maps(4, 5, 4, 4).float()).backward()
    assert all(w.grad.abs().max() > 0 for w in vid.parameters())


def test_degenerate_maps_are_finite():
    vid = VIDLoss(3, 4, 3)
    random, zero, constant = maps(2, 3, 4, 4).float(), torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 3.7)
    for student in (random, zero, constant):
        for teacher in (random, zero, constant):
            check_finite(vid, student, teacher)
            check_finite(vid, student[:1], teacher[:1])
    with torch.no_grad():
        vid.log_scale.fill_(-1e4)
    check_finite(vid, random, constant)


def test_the_memory_format_and_the_dtype_of_a_map_do_not_matter():
    vid = VIDLoss(3, 4, 5)
    student, teacher = maps(2, 3, 8, 8).bfloat16(), maps(2, 5, 4, 4).bfloat16()
    expected = vid(student.float(), teacher.float())
    assert torch.equal(vid(student, teacher), expected)
    channels_last = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    torch.testing.assert_close(vid(*channels_last), expected)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (3, 5, 4, 4), (2, 5, 4, 3)])
def test_maps_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\), but the teacher's is"):
        VIDLoss(3, 4, 5)(torch.ones(2, 3, 4, 4), torch.ones(shape))
