import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.KD import kd_loss
from distiller_zoo.MLLD import MLLD, batch_loss, class_loss, shares_below_median

FED = ("logit_s", "logit_t")


def test_it_is_the_authors_in_value_and_gradient(newer_losses):
    check_golden(newer_losses, "mlld_one_view", MLLD(), *FED)
    check_golden(newer_losses, "mlld", MLLD(), *FED, "logit_s_strong", "logit_t_strong")
    for loss, entry in ((class_loss, "mlld_class[T=4]"), (batch_loss, "mlld_batch[T=4]")):

        def at_four(logit_s, logit_t, loss=loss):
            return loss((logit_s / 4).softmax(dim=1), (logit_t / 4).softmax(dim=1))

        check_golden(newer_losses, entry, at_four, *FED)


def test_about_half_of_samples_and_classes_are_at_or_below_the_median():
    logits = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    assert [float(x) for x in shares_below_median(logits)] == pytest.approx([5 / 9, 0.5])


def test_its_first_term_is_kd_at_each_temperature():
    logit_s, logit_t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    terms = MLLD((2, 3)).terms(logit_s, logit_t)
    expected = (kd_loss(logit_s, logit_t, 2) + kd_loss(logit_s, logit_t, 3)) * shares_below_median(logit_t)[0]
    torch.testing.assert_close(terms["instance"], expected)
    assert list(terms.values()) == MLLD((2, 3))(logit_s, logit_t)
    check_finite(MLLD(), 1e4 * torch.eye(3), 1e4 * torch.eye(3).flip(0))
