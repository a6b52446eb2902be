"""The measures without labels, against their definitions."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from conftest import make_dataset
from dataset.loader import Loader
from distiller_zoo import EGA
from helper.agreement import held_out, linear_cka, mean_cosine, neighbour_overlap
from helper.objective import Objective
from helper.teacher import EncoderTeacher
from models import create_student
from models.heads import TeacNet

CPU = torch.device("cpu")
OPT = Namespace(device="cpu", amp="off")


@pytest.mark.parametrize("count", [1, 2, 9, 40, 1203])
def test_overlap_is_that_of_the_neighbours_of_highest_cosine(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    y = torch.cat([x, torch.randn(count, 2, generator=generator)], dim=1)
    k = min(10, count - 1)
    shared = [100.0] if count < 12 else []
    if not shared:
        near = [NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(f).kneighbors(f)[1][:, 1:] for f in (x, y)]
        shared = [100 * len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]
    expected = np.mean(shared) if count > 1 else 0
    assert neighbour_overlap(x, y) == pytest.approx(expected)
    assert neighbour_overlap(x, 3 * x) == (100 if count > 1 else 0)


def test_cosine_is_the_mean_over_samples():
    x, y = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert mean_cosine(x, y) == pytest.approx(0.5)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    data = make_dataset(num_test=21)
    bank = torch.randn(21, 12)
    student, teacher = (
        create_student("resnet8", 12, 5),
        EncoderTeacher(lambda split, index, view: bank[index], None, dim=12),
    )
    return data, bank, student, teacher


def test_the_loss_is_the_mean_over_batches_as_in_training(networks):
    data, bank, student, teacher = networks
    loader = Loader(data.test, "test", 8, CPU, least=2)
    objective = Objective(EGA(0.8, 0.24), ("joint_s", "joint_t"), 0, 0, 2, 4, beta_warmup=5, relational=True)
    found = held_out(loader, student, teacher, objective, OPT)
    with torch.no_grad():
        f_s = torch.cat([student.eval()(batch.image).embedding for batch in loader.epoch()])
        losses = [len(rows) * 2 * EGA(0.8, 0.24)(f_s[rows], bank[rows]) for rows in torch.arange(21).split(8)]
    assert found["heldout_loss"] == pytest.approx(float(sum(losses)) / 21, rel=1e-5)
    assert found["heldout_cka"] == pytest.approx(linear_cka(f_s, bank))
    assert found["heldout_cosine"] == pytest.approx(mean_cosine(f_s, bank))
    assert found["heldout_knn"] == neighbour_overlap(f_s, bank)


class Remembers(torch.nn.Module):
    """A loss with a state, and batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(12)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, f_s, f_t, *index):
        self.calls += 1
        return (self.norm(f_s) - f_t).square().mean()


def test_measuring_changes_neither_the_loss_nor_the_networks(networks):
    data, _, student, teacher = networks
    criterion = Remembers()
    objective = Objective(criterion, ("joint_s", "joint_t"), 0, 0, 1, 4)
    before = {name: x.clone() for name, x in [*student.state_dict().items(), *criterion.state_dict().items()]}
    held_out(Loader(data.test, "test", 8, CPU), student, teacher, objective, OPT)
    for name, x in [*student.state_dict().items(), *criterion.state_dict().items()]:
        assert torch.equal(x, before[name]), name
    assert criterion.training and not criterion.calls


def test_a_loss_that_knows_training_images_by_number_is_not_measured(networks):
    data, _, student, teacher = networks
    objective = Objective(Remembers(), ("joint_s", "joint_t", "index"), 0, 0, 1, 4)
    found = held_out(Loader(data.test, "test", 8, CPU), student, teacher, objective, OPT)
    assert found["heldout_loss"] is None and found["heldout_knn"] > 0


def test_a_teacher_with_a_head_is_compared_in_the_joint_space(networks):
    data, bank, student, _ = networks
    teacher = EncoderTeacher(lambda split, index, view: bank[index], TeacNet(12, 12, 5))
    objective = Objective(EGA(), ("joint_s", "joint_t"), 0, 0, 1, 4, relational=True)
    with torch.no_grad():
        found = held_out(Loader(data.test, "test", 8, CPU), student, teacher, objective, OPT)
        f_s = torch.cat([student(batch.image).embedding for batch in Loader(data.test, "test", 8, CPU).epoch()])
        assert found["heldout_cosine"] == pytest.approx(mean_cosine(f_s, teacher.head(bank)[0]), abs=1e-6)
