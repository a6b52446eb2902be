import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.FitNet import HintLoss, hint_loss


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    f_s, f_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return f_s, f_t


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "hint", HintLoss(), "f_s", "f_t")


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (7, 2), (1, 1)])
def test_it_is_the_mean_squared_error_over_all_elements(shape):
    f_s, f_t = maps(*shape)
    expected = ((f_s.numpy() - f_t.numpy()) ** 2).mean()
    np.testing.assert_allclose(hint_loss(f_s, f_t).item(), expected, rtol=1e-13)


def test_its_gradients_are_its_derivatives():
    assert torch.autograd.gradcheck(hint_loss, tuple(f.requires_grad_() for f in maps(2, 3, 2, 2)))


def test_equal_student_and_teacher_have_no_loss_and_a_finite_gradient():
    f_s, _ = maps(2, 3, 2, 2)
    assert hint_loss(f_s, f_s.clone()) == 0
    check_finite(hint_loss, f_s, f_s.clone())
    check_finite(hint_loss, torch.zeros(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) * 300 for f in maps(4, 6))
    assert torch.equal(hint_loss(f_s, f_t), hint_loss(f_s.float(), f_t.float()))
    assert torch.equal(hint_loss(f_s, f_t.float()), hint_loss(f_s.float(), f_t.float()))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 1)), ((2, 3, 4, 4), (2, 3, 2, 2)), ((4, 3), (2, 3))])
def test_different_shapes_are_refused_even_where_they_would_broadcast(shapes):
    with pytest.raises(ValueError, match=r"got \(\d") as error:
        hint_loss(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
