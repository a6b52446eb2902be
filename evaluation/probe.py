"""What frozen features are worth on another data set: a linear probe and nearest neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Split, load_dataset
from dataset.loader import Loader
from dataset.splits import holdout_rows
from errors import InputError
from helper.probe import nearest_neighbours

from .subjects import Subject

# Weight decays of the probe, from strong to weak; a share of each class's training images chooses among them.
STRENGTHS = tuple(10.0**-power for power in range(7))
_HOLDOUT = 0.2

# The search ends after so many weaker ones that are no better than the best.
_PATIENCE = 2

_STEPS = 500


def standardize_columns(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) with the mean and the standard deviation of the training part taken out, in float32."""
    std, mean = torch.std_mean(train.float(), dim=0, correction=0)
    scale = torch.where(std > 0, 1 / std, 0)
    return (train.float() - mean) * scale, (test.float() - mean) * scale


def fit_logistic(x: Tensor, targets: Tensor, num_classes: int, strength: float, start: Tensor | None = None) -> Tensor:
    """Multinomial logistic regression by L-BFGS: the mean cross-entropy + strength / 2 · ||W||², the bias left out.

    Args:
        x: features (N, D), of about unit scale.
        targets: (N,) classes.
        strength: scikit-learn's 1 / (N C).
        start: weights to begin with; zeros by default.

    Returns:
        Weights (classes, D + 1), the bias last.
    """
    weight = x.new_zeros(num_classes, x.shape[1] + 1) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=_STEPS, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(weight, x), targets) + strength / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def logits(weight: Tensor, x: Tensor) -> Tensor:
    """(N, classes) of features (N, D) and weights (classes, D + 1)."""
    return torch.addmm(weight[:, -1], x, weight[:, :-1].T)


def linear_probe(train: Tensor, train_targets: Tensor, test: Tensor, num_classes: int) -> tuple[Tensor, float]:
    """Classify by multinomial logistic regression on standardised features.

    A stratified hold-out of the training part chooses the strength among ``STRENGTHS``; the whole part is then fitted
    with it.

    Args:
        train, test: features (N, D) and (M, D).
        train_targets: (N,) classes.

    Returns:
        Predicted classes (M,), and the strength.

    Raises:
        InputError: no class has two images, one of them to hold out.
    """
    kept, held = holdout_rows(train_targets.cpu(), _HOLDOUT)
    x, y = standardize_columns(train[kept], train[held])
    best, best_correct, behind, weight = STRENGTHS[0], -1, 0, None
    for strength in STRENGTHS:  # each begins where the last, smoother one ended
        weight = fit_logistic(x, train_targets[kept], num_classes, strength, weight)
        correct = int((logits(weight, y).argmax(dim=1) == train_targets[held]).sum())
        behind += 1
        if correct > best_correct:
            best, best_correct, behind = strength, correct, 0
        if behind == _PATIENCE:
            break
    x, y = standardize_columns(train, test)
    weight = fit_logistic(x, train_targets, num_classes, best)
    return logits(weight, y).argmax(dim=1), best


class Transfer:
    """What frozen pooled features are worth on another data set: a linear probe, and k nearest neighbours.

    A teacher that several runs share is asked once. Images without a label are left out.

    Args:
        opt: ``probe``, the name of the data set, ``probe_dir`` and ``image_size``.
        save_dir: the folder of all results; decoded image files go there.

    Raises:
        InputError, OSError: see ``load_dataset``.
    """

    def __init__(self, opt, save_dir: str):
        size = opt.image_size if opt.probe == "folder" else None
        full = load_dataset(opt.probe, opt.probe_dir, image_size=size, save_dir=save_dir)
        labelled = [(split.targets >= 0).nonzero().flatten() for split in (full.train, full.test)]
        if not all(map(len, labelled)):
            raise InputError(f"--probe {opt.probe} needs labels in its training and in its test split")
        self.dataset = full.select(*labelled)
        if torch.bincount(self.dataset.train.targets).max() < 2:
            raise InputError(f"--probe {opt.probe}: no class has two training images, one of them to hold out")
        self._teachers: dict[tuple, dict] = {}

    def data(self, subject: Subject) -> str:
        """The data set that the answer is about."""
        return self.dataset.name

    def check(self, subject: Subject) -> None:
        """Nothing is refused: every subject has features."""

    def __call__(self, subject: Subject) -> dict[str, dict]:
        """'transfer' by 'student' and 'teacher'."""
        results, options = {}, subject.run.options
        loaders = [subject.loader(split, self.dataset.views, name) for name, split in self._splits()]
        if subject.trained.network is not None:
            results["student"] = self._ask(subject, subject.trained.network, loaders)
        if subject.has_teacher:
            # A CNN sees what the student sees.
            seen = subject.trained.image_size if not options["clip_tn"] else options["teacher_resolution"]
            key = (options.get("clip_sha256"), options.get("teacher_sha256"), seen)
            if key not in self._teachers:
                teacher = subject.teacher(self.dataset, encode_once=True)
                self._teachers[key] = self._ask(subject, teacher, loaders)
            results["teacher"] = self._teachers[key]
        return {"transfer": results}

    def _splits(self) -> tuple[tuple[str, Split], ...]:
        return ("train", self.dataset.train), ("test", self.dataset.test)

    def _ask(self, subject: Subject, network, loaders: list[Loader]) -> dict[str, float]:
        train, test = (subject.predict(network, loader).features.to(subject.device) for loader in loaders)
        known, wanted = (split.targets.to(subject.device) for _, split in self._splits())
        classes = len(self.dataset.classes)
        predicted, strength = linear_probe(train, known, test, classes)
        found = {"linear": predicted}
        found |= {f"knn_{k}": x for k, x in nearest_neighbours(train, known, test, classes).items()}
        return {name: 100 * float((x == wanted).double().mean()) for name, x in found.items()} | {"strength": strength}
