import pytest
import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden, formula_weights
from distiller_zoo.RRD import RRD, queue_kl


def test_two_calls_are_the_authors_in_value_gradient_and_queue(newer_losses):
    entry, loss = "rrd[t_s=0.1,t_t=0.02]", formula_weights(RRD(12, 20, 8, 32).double())
    loss.queue.copy_(newer_losses["in/queue"])
    f_s, f_t = newer_losses["in/f_s"].clone().requires_grad_(), newer_losses["in/f_t"]
    values = torch.stack([loss(f_s, f_t), loss(f_s.flip(0), f_t.flip(0))])
    (gradient,) = torch.autograd.grad(values.sum(), f_s)
    torch.testing.assert_close(values, newer_losses[f"out/{entry}/value"], rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, newer_losses[f"out/{entry}/grad/f_s"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(loss.queue, newer_losses[f"out/{entry}/queue"], rtol=1e-9, atol=1e-12)
    assert loss.place == newer_losses[f"out/{entry}/pointer"]


def test_kl_over_a_queue_is_the_authors_in_value_and_gradient(newer_losses):
    check_golden(newer_losses, "queue_kl[T=0.07]", queue_kl, "f_s_wide", "f_t", "queue_wide")


@pytest.mark.parametrize("batches", [[3, 3, 3], [5, 4], [9], [2, 7]])
def test_the_queue_keeps_the_latest_rows(batches):
    """Eight rows, which no batch need divide."""
    loss, f_t = RRD(4, 4, 6, 8), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for rows in f_t.split(batches):
        loss(rows, rows)
    latest = F.normalize(loss.embed_t(f_t[-8:]), dim=1)
    distances = torch.cdist(latest, loss.queue).amin(dim=1)
    assert loss.place == (1 if batches != [9] else 0) and distances.max() < 1e-6


def test_the_teachers_layer_does_not_learn_and_the_students_does():
    loss, f = RRD(4, 4, 6, 8), torch.randn(3, 4)
    loss(f, f).backward()
    assert loss.embed_t.weight.grad is None and loss.embed_s.weight.grad.any()


def test_the_queue_can_be_the_bank():
    generator = torch.Generator().manual_seed(0)
    bank, f_s, f_t = (torch.randn(n, 4, generator=generator) for n in (11, 3, 3))
    loss = RRD(4, 4, 6, None, T_s=0.5, T_t=0.5)
    loss.acquaint(bank, None, None)
    rows = F.normalize(loss.embed_t(bank), dim=1)
    p_t = (F.normalize(loss.embed_t(f_t), dim=1) @ rows.T / 0.5).softmax(dim=1)
    log_s = (F.normalize(loss.embed_s(f_s), dim=1) @ rows.T / 0.5).log_softmax(dim=1)
    torch.testing.assert_close(loss(f_s, f_t), -(p_t * log_s).sum(dim=1).mean())
    torch.testing.assert_close(loss.queue, rows)
    assert "queue" not in loss.state_dict() and "queue" in RRD(4, 4).state_dict()


def test_zeros_have_a_finite_loss_and_gradient():
    check_finite(RRD(4, 4, 6, 8), torch.zeros(3, 4), torch.zeros(3, 4))
