"""What a network's frozen features are worth on another data set, by its nearest neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import load_dataset
from dataset.loader import Loader, eval_batch_size
from dataset.views import Normalization, SeenAt
from errors import InputError
from models.heads import Classifier, Student

from . import distributed
from .runtime import autocast

# The neighbours that vote during training; evaluate.py --probe counts those of 1, 5 and 20.
_NEIGHBOURS = 20


def nearest_neighbours(
    train: Tensor, train_targets: Tensor, test: Tensor, num_classes: int, ks: tuple[int, ...] = (1, 5, 20)
) -> dict[int, Tensor]:
    """Classify by the vote of the k training images of highest cosine similarity, for each k.

    Where classes have equally many votes, the one with the more similar voters wins.

    Returns:
        {k: predicted classes (M,)}.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in test.split(1000):
        similarity, neighbour = (part @ train.T).topk(min(max(ks), len(train)), dim=1)
        voted = train_targets[neighbour]
        # A similarity counts less than any vote.
        votes = 1 + similarity / (4 * max(ks))
        for k in ks:
            tally = votes.new_zeros(len(part), num_classes).scatter_add_(1, voted[:, :k], votes[:, :k])
            predicted[k].append(tally.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}


class Probe:
    """The k-NN accuracy on another data set after some epochs; the data set's labels train nothing.

    Images without a label are left out.

    Args:
        opt: ``probe``, the data set's name; ``probe_dir``, ``probe_freq``, ``epochs``, ``save_dir`` and
            ``max_bad_images``.
        image_size: height and width of the student's images in pixels; other images are resized to it.

    Raises:
        InputError, OSError: a split has no label; see also ``load_dataset``.
    """

    def __init__(self, opt, image_size: int):
        size, self.opt, self.image_size = image_size if opt.probe == "folder" else None, opt, image_size
        full = load_dataset(
            opt.probe, opt.probe_dir, image_size=size, save_dir=opt.save_dir, max_bad_images=opt.max_bad_images
        )
        labelled = [(split.targets >= 0).nonzero().flatten() for split in (full.train, full.test)]
        if not all(map(len, labelled)):
            raise InputError(f"--probe {opt.probe} needs labels in its training and in its test split")
        self.dataset = full.select(*labelled)
        self.loaders: list[Loader] = []

    def open(self, opt, normalization: Normalization) -> None:
        """Make the loaders, for ``opt.device`` and ``opt.amp``."""
        self.opt, views = opt, self.dataset.views
        common = {
            "views": views if views.size == self.image_size else SeenAt(views, self.image_size),
            "normalization": normalization,
            "rank": distributed.rank(),
            "processes": distributed.count(),
        }
        size, device = eval_batch_size(opt.device, self.image_size), torch.device(opt.device)
        splits = (("train", self.dataset.train), ("test", self.dataset.test))
        self.loaders = [Loader(split, name, size, device, **common) for name, split in splits]

    @torch.no_grad()
    def __call__(self, epoch: int, student: Student | Classifier) -> dict[str, float]:
        """probe_acc, in percent, after every ``probe_freq`` epochs and the last; empty after the others."""
        if epoch % self.opt.probe_freq and epoch != self.opt.epochs:
            return {}
        student.eval()
        (train, targets), (test, wanted) = (self._features(loader, student) for loader in self.loaders)
        predicted = nearest_neighbours(train, targets, test, len(self.dataset.classes), (_NEIGHBOURS,))[_NEIGHBOURS]
        return {"probe_acc": 100 * float((predicted == wanted).double().mean())}

    def _features(self, loader: Loader, student: Student | Classifier) -> tuple[Tensor, Tensor]:
        """Pooled features (N, F) and targets (N,) of all processes' images, on the CPU."""
        own = []
        for batch in loader.epoch():
            with autocast(self.opt.device, self.opt.amp):
                out = student(batch.image)
            own.append((out.features[-1].float().cpu(), batch.target.cpu()))
        parts = [part for each in distributed.collect(own) for part in each]
        features, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, targets
