import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.NormDirection import NormDirection


def test_it_is_the_authors_in_value_and_gradient(newer_losses):
    def loss(*args):
        return NormDirection(newer_losses["in/centres"].to(args[0].dtype))(*args)

    check_golden(newer_losses, "nd", loss, "f_s_wide", "f_t", "target")


def test_a_long_embedding_along_its_classs_centre_is_perfect():
    loss = NormDirection(torch.tensor([[0.0, 2], [5, 0]]))
    f_s, f_t = torch.tensor([[0.0, 3], [1, 0]]), torch.tensor([[1.0, 2], [0, 4]])
    assert loss(f_s, f_t, torch.tensor([0, 1])).item() == pytest.approx((0 + 1 - 1 / 4) / 2)
    check_finite(lambda s, t: loss(s, t, torch.tensor([0, 1])), torch.zeros(2, 2), torch.zeros(2, 2))


def test_it_learns_the_means_of_the_classes():
    loss, f_t = NormDirection(torch.zeros(3, 2)), torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    loss.acquaint(f_t, torch.tensor([2, -1, 2, 0]), lambda: None)
    torch.testing.assert_close(loss.centres, torch.tensor([[7.0, 8], [0, 0], [3, 4]]))
