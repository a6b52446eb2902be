import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from conftest import make_dataset
from dataset.loader import Batch, Loader
from distiller_zoo import EGA, METHODS, kd_loss
from errors import NonFiniteLoss
from helper.meters import EpochLog, Totals
from helper.objective import Objective, mean_cross_entropy
from helper.step import HeadTraining, Step
from helper.teacher import EncoderTeacher
from helper.validation import Evaluation, validate
from models import create_student
from models.heads import Outputs, TeacNet
from training import train_epoch

CPU = torch.device("cpu")
OPT = Namespace(device="cpu", amp="off", print_freq=100, epochs=1)


def outputs(seed: int, classes: int = 5) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(6, 8, generator=generator).requires_grad_()
    features = [torch.randn(shape, generator=generator) for shape in ((6, 2, 4, 4), (6, 3, 4, 4), (6, 5, 2, 2), (6, 7))]
    return Outputs(embedding, torch.randn(6, classes, generator=generator).requires_grad_(), features)


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 0]), None, torch.zeros(6, dtype=torch.long))


def objective(distill: str, gamma: float, alpha: float, beta: float, **more) -> Objective:
    build, feeds = METHODS[distill].with_teacher(clip=True)
    criterion = build(Namespace(node_weight=0.8, edge_weight=0.24), None) if build else None
    return Objective(criterion, feeds, gamma, alpha, beta, kd_T=3.0, **more)


def test_the_loss_is_the_weighted_sum_of_its_terms(batch):
    s, t = outputs(0), outputs(1)
    loss, terms = objective("ega", 0.5, 0.3, 2.0)(s, t, batch)
    cls, kd = F.cross_entropy(s.logits, batch.target), kd_loss(s.logits, t.logits, 3.0)
    torch.testing.assert_close(loss, 0.5 * cls + 0.3 * kd + 2 * EGA()(s.embedding, t.embedding))
    assert set(terms) == {"cls", "kd", "distill", "node", "edge"}
    torch.testing.assert_close(terms["node"] + terms["edge"], terms["distill"])
    torch.testing.assert_close(terms["node"], 2 * EGA(0.8, 0)(s.embedding, t.embedding))


@pytest.mark.parametrize(
    ("distill", "weights", "names"),
    [
        ("none", (1, 0, 0), {"cls"}),
        ("kd", (0.1, 0.9, 0), {"cls", "kd"}),
        ("ega", (1, 0, 1), {"cls", "distill", "node", "edge"}),
        ("ega", (1, 0, 0), {"cls"}),
    ],
)
def test_terms_without_weight_are_left_out(batch, distill, weights, names):
    t = None if distill == "none" else outputs(1)
    _, terms = objective(distill, *weights)(outputs(0), t, batch)
    assert set(terms) == names


def test_no_gradient_of_the_students_loss_reaches_the_teacher(batch):
    s, t = outputs(0), outputs(1)
    loss, _ = objective("ega", 1, 1, 1)(s, t, batch)
    loss.backward()
    assert t.embedding.grad is None
    assert t.logits.grad is None
    assert s.embedding.grad.abs().sum() > 0


class Recorder(torch.nn.Module):
    """Keeps what it is fed."""

    def forward(self, *args):
        self.fed = args
        return args[0].sum() * 0


def test_a_new_method_is_fed_what_its_row_names(batch):
    s, t, loss = outputs(0), outputs(1), Recorder()
    _, terms = Objective(loss, ("logit_t", "f_s", "target", "index"), 1, 0, 1, 4)(s, t, batch)
    assert [x.tolist() for x in loss.fed] == [x.tolist() for x in (t.logits, s.embedding, batch.target, batch.index)]
    assert set(terms) == {"cls", "distill"}


@pytest.mark.parametrize("clip", [True, False])
def test_embeddings_are_projected_ones_with_a_clip_and_pooled_features_with_a_cnn(batch, clip):
    s, t, loss = outputs(0), outputs(1), Recorder()
    Objective(loss, ("f_s", "f_t", "joint_s", "joint_t"), 1, 0, 1, 4, clip)(s, t, batch)
    pooled = (s.embedding, t.embedding) if clip else (s.features[-1], t.features[-1])
    expected = (*pooled, s.embedding, t.embedding)
    assert all(torch.equal(x, y) for x, y in zip(loss.fed, expected, strict=True))


def test_maps_are_the_stages_without_the_stem_and_the_pooled_features(batch):
    s, t = outputs(0), outputs(1)
    seen = []

    def loss(maps_s, feat_t):
        seen.extend((maps_s, feat_t))
        return [maps_s[0].sum(), maps_s[1].sum()]

    _, terms = Objective(loss, ("maps_s", "feat_t"), 1, 0, 3, 4, clip=False)(s, t, batch)
    assert [[x.shape for x in fed] for fed in seen] == [
        [x.shape for x in s.features[1:3]],
        [x.shape for x in t.features],
    ]
    torch.testing.assert_close(terms["distill"], 3 * (s.features[1].sum() + s.features[2].sum()))


@pytest.mark.parametrize(("epoch", "share"), [(1, 0.25), (3, 0.75), (4, 1), (9, 1)])
def test_the_methods_weight_grows_over_the_warm_up(batch, epoch, share):
    s, t = outputs(0), outputs(1)
    _, whole = objective("ega", 1, 1, 2)(s, t, batch)
    _, terms = objective("ega", 1, 1, 2, beta_warmup=4)(s, t, batch, epoch)
    for name, value in whole.items():
        torch.testing.assert_close(terms[name], value * (1 if name in ("cls", "kd") else share))


def test_standardised_logits_reach_kd_and_the_method_but_not_the_classification(batch):
    s, t, loss = outputs(0), outputs(1), Recorder()
    _, terms = Objective(loss, ("logit_s", "logit_t"), 1, 1, 1, 4, logit_standard=True)(s, t, batch)
    for found, out in zip(loss.fed, (s, t), strict=True):
        torch.testing.assert_close(found.mean(1), torch.zeros(6))
        torch.testing.assert_close(found.std(1), torch.ones(6))
        assert torch.equal(found.argmax(1), out.logits.argmax(1))
    torch.testing.assert_close(terms["cls"], F.cross_entropy(s.logits, batch.target))
    torch.testing.assert_close(terms["kd"], kd_loss(*loss.fed, 4))


def test_a_teacher_that_no_term_looks_at_is_not_needed():
    assert objective("ega", 1, 0, 1).needs_teacher
    assert objective("kd", 1, 0.5, 0).needs_teacher
    assert not objective("ega", 1, 0, 0).needs_teacher
    first_stage_only = Objective(Recorder(), (), 1, 0, 1, 4)
    assert not first_stage_only.needs_teacher
    first_stage_only.alpha = 1
    assert first_stage_only.needs_teacher


def test_losses_are_computed_in_float32(batch):
    s, t = outputs(0), outputs(1)
    half = Outputs(s.embedding.bfloat16(), s.logits.bfloat16(), s.features)
    loss, terms = objective("ega", 1, 1, 1)(half, t, batch)
    assert {value.dtype for value in (loss, *terms.values())} == {torch.float32}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_term_that_is_not_finite_is_named_with_its_step(value):
    loader = Loader(make_dataset().train, "train", 10, CPU)  # 7 steps
    totals = Totals()
    log = EpochLog("Epoch 4", loader, print_freq=100, epochs_left=0, totals=totals)

    def epoch() -> None:
        for step in range(1, 8):
            losses = {"loss_cls": torch.tensor(1.0), "loss_edge": torch.tensor(value if step in (3, 5) else 1.0)}
            totals.add(losses, {"train_acc": torch.tensor(5.0)}, 10)
            log.update(step, 10)

    with pytest.raises(NonFiniteLoss, match="loss_edge is not finite at step 3 of epoch 4"):
        epoch()
    with pytest.raises(NonFiniteLoss):
        log.result()


def test_an_epochs_averages_weigh_the_smaller_last_batch_less(capsys):
    dataset = make_dataset(num_train=25)
    totals = Totals()
    log = EpochLog("Epoch 1", Loader(dataset.train, "train", 10, CPU), print_freq=2, epochs_left=0, totals=totals)
    for step, (loss, n) in enumerate([(1.0, 10), (2.0, 10), (4.0, 5)], start=1):
        totals.add({"train_loss": torch.tensor(loss)}, {"train_acc": torch.tensor(loss * 10)}, n)
        log.update(step, n)
    result = log.result()
    assert result["train_loss"] == pytest.approx(2.0)
    assert result["train_acc"] == pytest.approx(20.0)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in printed] == ["Epoch 1 [2/3", "Epoch 1 [3/3"]


def teacher(dataset) -> EncoderTeacher:
    """A head on embeddings that are the images' mean colours."""
    torch.manual_seed(0)
    images = {"train": dataset.train.images, "test": dataset.test.images}
    return EncoderTeacher(lambda split, index, view: images[split][index].float().mean((2, 3)) / 255, TeacNet(3, 8, 5))


@pytest.mark.parametrize("batch_size", [1, 7, 20, 500])
def test_testing_sees_every_sample_once_whatever_the_batch_size(batch_size):
    dataset = make_dataset()
    torch.manual_seed(0)
    student, tutor = create_student("resnet8", 8, 5), teacher(dataset)
    student.train()
    found = validate(Loader(dataset.test, "test", batch_size, CPU), student, tutor, OPT)
    (whole,) = Loader(dataset.test, "test", 20, CPU).epoch()
    with torch.no_grad():
        logits = student.eval()(whole.image).logits
        logit_t = tutor("test", whole).logits
    assert found["test_loss"] == pytest.approx(F.cross_entropy(logits, whole.target).item(), rel=1e-5)
    assert found["test_acc"] == pytest.approx(100 * (logits.argmax(1) == whole.target).float().mean().item())
    assert found["test_acc_top5"] == pytest.approx(100)  # of five classes
    assert found["teacher_acc"] == pytest.approx(100 * (logit_t.argmax(1) == whole.target).float().mean().item())
    alone = validate(Loader(dataset.test, "test", batch_size, CPU), None, tutor, OPT, prefix="val")
    assert alone["val_acc"] == pytest.approx(found["teacher_acc"])


def test_testing_changes_no_statistic_and_keeps_no_gradient():
    dataset = make_dataset()
    student = create_student("resnet8", 8, 5).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    validate(Loader(dataset.test, "test", 8, CPU), student, None, OPT)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_head_learns_from_the_embeddings():
    dataset = make_dataset()
    tutor = teacher(dataset)
    loader = Loader(dataset.train, "train", 10, CPU, training=True, teacher_views=1, images=False)
    optimizer = torch.optim.SGD(tutor.head.parameters(), 0.5, momentum=0.9)
    step = Step(HeadTraining(tutor, loader), [optimizer], torch.amp.GradScaler("cpu", enabled=False), loader)
    losses = [train_epoch(epoch, step, 15, print_freq=100)["train_loss"] for epoch in range(1, 16)]
    assert losses[0] == pytest.approx(math.log(5), rel=0.3)
    assert losses[-1] < losses[0] / 2


def test_the_classification_is_of_the_labelled_images_and_the_rest_of_all(batch):
    s, t = outputs(0), outputs(1)
    target = torch.tensor([0, -1, 2, -1, -1, 4])
    some = batch._replace(target=target, labelled=torch.tensor(3))
    loss, terms = objective("ega", 0.5, 0.3, 2.0)(s, t, some)
    _, whole = objective("ega", 0.5, 0.3, 2.0)(s, t, batch)
    kept = target >= 0
    torch.testing.assert_close(terms["cls"], 0.5 * F.cross_entropy(s.logits[kept], target[kept], reduction="sum") / 6)
    torch.testing.assert_close(loss, terms["cls"] + terms["kd"] + terms["distill"])
    assert all(torch.equal(terms[name], whole[name]) for name in ("kd", "distill", "node", "edge"))


def test_a_batch_without_a_label_has_no_classification_and_gradients_that_are_finite(batch):
    s = outputs(0)
    none = batch._replace(target=torch.full((6,), -1), labelled=torch.tensor(0))
    loss, terms = objective("ega", 1, 0, 1)(s, outputs(1), none)
    assert terms["cls"] == 0
    torch.testing.assert_close(loss, EGA()(s.embedding, outputs(1).embedding))
    loss.backward()
    assert (s.logits.grad == 0).all()
    assert s.embedding.grad.isfinite().all()
    assert mean_cross_entropy(s.logits, none) == 0


def test_a_labelled_image_weighs_the_same_whatever_batch_it_is_in():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    target = torch.arange(60) % 5
    target[torch.rand(60, generator=generator) < 0.8] = -1
    known = target >= 0
    expected = F.cross_entropy(logits[known], target[known], reduction="sum")
    for size in (7, 60):
        order = torch.randperm(60, generator=generator)
        labels = [int(known[rows].sum()) for rows in order.split(size)]
        assert size == 60 or {0, 1} < set(labels)
        batches = [Batch(rows, target[rows], None, rows, labelled=known[rows].sum()) for rows in order.split(size)]
        found = sum(len(batch.index) * mean_cross_entropy(logits[batch.index], batch) for batch in batches)
        torch.testing.assert_close(found, expected)


def test_an_epochs_averages_count_those_that_have_a_label():
    """Steps of 10 with 5, 0 and 2 labels; samples without one count as zero in a step's mean."""
    totals = Totals()
    for value, labelled in ((0.5, 5), (0.0, 0), (1.6, 2)):
        losses = {"loss_cls": torch.tensor(value), "loss_distill": torch.tensor(value)}
        totals.add(losses, {"train_acc": torch.tensor(10 * value)}, 10, torch.tensor(labelled))
    found = totals.averages("Epoch 1")
    assert found == pytest.approx({"loss_cls": 3.0, "loss_distill": 0.7, "train_acc": 30.0})
    totals.reset()
    totals.add(
        {"loss_cls": torch.tensor(0.0), "loss_distill": torch.tensor(2.0)},
        {"train_acc": torch.tensor(0.0)},
        10,
        torch.tensor(0),
    )
    assert totals.averages("Epoch 2") == {"loss_distill": 2.0}


def test_what_was_measured_can_be_taken_up_again():
    dataset = make_dataset(num_train=25)
    loader = Loader(dataset.train, "train", 10, CPU)

    def add(totals: Totals, log: EpochLog, step: int) -> None:
        totals.add({"train_loss": torch.tensor(step**2 / 3)}, {"train_acc": torch.tensor(step**2 * 7.0)}, 10)
        log.update(step, 10)

    whole, first, second = Totals(), Totals(), Totals()
    log = EpochLog("Epoch 1", loader, 100, 0, whole)
    for step in (1, 2, 3):
        add(whole, log, step)
    begun = EpochLog("Epoch 1", loader, 100, 0, first)
    add(first, begun, 1)
    state = begun.state_dict()
    add(first, begun, 2)  # the state is of its own moment
    going_on = EpochLog("Epoch 1", loader, 100, 0, second)
    going_on.load_state_dict(state)
    for step in (2, 3):
        add(second, going_on, step)
    assert second.averages("Epoch 1") == whole.averages("Epoch 1")
    assert going_on.count == log.count


def test_what_is_not_finite_is_not_saved():
    loader = Loader(make_dataset().train, "train", 10, CPU)
    totals = Totals()
    log = EpochLog("Epoch 4", loader, print_freq=100, epochs_left=0, totals=totals)
    totals.add({"train_loss": torch.tensor(math.nan)}, {}, 10)
    with pytest.raises(NonFiniteLoss, match="step 1 of epoch 4"):
        log.state_dict()


def test_testing_a_student_that_nothing_teaches_to_classify_measures_no_accuracy():
    dataset = make_dataset()
    student = create_student("resnet8", 3, 5)
    loaders = Namespace(
        test=Loader(dataset.test, "test", 20, CPU), val=None, held_out=Loader(dataset.test, "test", 8, CPU)
    )
    opt = Namespace(device="cpu", amp="off", epochs=4, eval_freq=2)
    headless = EncoderTeacher(lambda split, index, view: torch.eye(3)[index % 3], None, dim=3)
    objective = Objective(EGA(), ("joint_s", "joint_t"), 0, 0, 1, 4, relational=True)
    evaluate = Evaluation(loaders, student, headless, opt, objective)
    assert evaluate(1) == {}
    record = evaluate(2)
    assert {name: record.pop(name) for name in ("test_loss", "test_acc", "test_acc_top5")} == dict.fromkeys(
        ("test_loss", "test_acc", "test_acc_top5")
    )
    assert record.keys() == {"heldout_loss", "heldout_cka", "heldout_cosine", "heldout_knn"}
    headless.embed = lambda split, index, view: pytest.fail("the test pass asked")
    assert "teacher_acc" not in Evaluation(loaders, student, headless, opt)(4)
