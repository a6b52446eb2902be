"""Who is evaluated: a finished run's student and teacher, or the network in a file of weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset import FILE_OPTIONS, ImageDataset, Split, open_dataset
from dataset.loader import Loader, eval_batch_size
from dataset.views import SeenAt, Views, normalization_of
from distiller_zoo import Needs
from errors import InputError
from helper.records import StoredRun
from helper.runtime import autocast
from helper.teacher import CnnTeacher, EncoderTeacher, architecture, cnn_normalization, load_cnn
from models.heads import Classifier, Student
from models.weights import read_file

from .student import TrainedStudent, open_student, restore_student
from .teacher import check_same, check_teacher, open_teacher

# What the options in a file of weights may lack: other projects' files have none.
_UNSAID = {"clip_tn": 1, "student_resolution": None, "pretrained_s": False, "joint": "projected"}
_UNSAID |= {"device": None, "dataset_sha256": None, "data_dir": "./data"}


@dataclass(frozen=True)
class Predictions:
    """What a network makes of N images, on the CPU.

    logits: (N, classes); None where the network does not classify.
    embedding: (N, D), in the joint space where there is one.
    features: (N, F), pooled; a frozen encoder's are its embedding.
    """

    logits: Tensor | None
    embedding: Tensor
    features: Tensor


@torch.no_grad()
def predict(network: Student | Classifier | EncoderTeacher | CnnTeacher, loader: Loader, amp: str) -> Predictions:
    """What a network makes of a loader's images, in order; a student runs under autocast, as in its run's test pass."""
    parts = []
    for batch in loader.epoch():
        if isinstance(network, Student | Classifier):
            with autocast(loader.device.type, amp):
                out = network(batch.image)
        else:
            out = network(loader.name, batch)
        parts.append([None if x is None else x.float().cpu() for x in (out.logits, out.embedding, out.features[-1])])
    return Predictions(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Subject:
    """Who is asked: a run's student beside its teacher, or what a file of weights holds.

    Attributes:
        trained: the student; its network is None where a file holds the head of a teacher alone.
        has_teacher: whether a teacher is asked too.
        dataset: the questions are about its test split.
        own: whether it is the data set of the run.
        device: 'cpu' or 'cuda'.
    """

    trained: TrainedStudent
    has_teacher: bool
    dataset: ImageDataset
    own: bool
    device: str

    @property
    def run(self) -> StoredRun:
        return self.trained.run

    @property
    def where(self) -> str:
        """Its name in messages."""
        return str(self.run.folder if self.run.history else self.trained.path)

    def teacher(
        self, dataset: ImageDataset, own: bool = False, encode_once: bool = False
    ) -> EncoderTeacher | CnnTeacher:
        """Its teacher, for the images of a data set; see ``open_teacher``."""
        num_classes = None if own else len(self.trained.classes)
        return open_teacher(self.run, self.trained.state, dataset, self.device, num_classes, encode_once)

    def networks(self, own: bool = True) -> dict[str, Student | Classifier | EncoderTeacher | CnnTeacher]:
        """The networks that there are, by 'student' and 'teacher'.

        Args:
            own: the teacher may look its run's test split up in the bank; otherwise it encodes what it is asked for.
        """
        found = {} if self.trained.network is None else {"student": self.trained.network}
        return found | ({"teacher": self.teacher(self.dataset, own and self.own)} if self.has_teacher else {})

    def loader(self, split: Split, views: Views, name: str = "test") -> Loader:
        """Batches of a split's test views at the size that the student takes, as the run's test pass saw them."""
        size = self.trained.image_size
        return Loader(
            split,
            name,
            eval_batch_size(self.device, size),
            torch.device(self.device),
            views=views if views.size == size else SeenAt(views, size),
            normalization=self.trained.normalization,
        )

    def predict(self, network: Student | Classifier | EncoderTeacher | CnnTeacher, loader: Loader) -> Predictions:
        """What one of its networks makes of a loader's images."""
        options = self.run.options
        amp = options["amp"] if options["device"] == self.device else "off"
        return predict(network, loader, amp)


def save_dir(run: StoredRun) -> str:
    """The folder of all results: SAVE of SAVE/student_model/NAME; ./save for a file of weights."""
    return str(run.folder.absolute().parents[1]) if run.history else "./save"


def open_subjects(paths: Sequence[str], opt, device: str) -> list[Subject]:
    """The subjects that the command line names; each data set is loaded once.

    Args:
        paths: folders of finished runs, or files of weights.
        opt: ``checkpoint``, ``dataset``, ``data_dir``, ``image_size`` and ``no_teacher``.

    Raises:
        InputError, OSError: a path is neither, or its weights or its data set are missing or have changed.
    """
    loaded: dict[str, ImageDataset] = {}

    def dataset_of(options: dict, save_dir: str) -> ImageDataset:
        recorded = ("dataset", "data_dir", "leave_out", *FILE_OPTIONS)
        wanted = {"dataset": "cifar100", "data_dir": "./data"}
        wanted |= {name: options[name] for name in recorded if name in options} | {"save_dir": save_dir}
        if opt.dataset is not None:
            wanted |= {"dataset": opt.dataset, "holdout": None, "leave_out": None, "data_list": None}
            wanted["image_size"] = opt.image_size if opt.dataset == "folder" else None
        if opt.data_dir is not None:
            wanted |= {"data_dir": opt.data_dir, "data_list": None}
        key = json.dumps(wanted)
        if key not in loaded:
            loaded[key] = open_dataset(wanted)
        return loaded[key]

    return [_open_subject(Path(path), opt, device, dataset_of) for path in paths]


def _open_subject(path: Path, opt, device: str, dataset_of: Callable[[dict, str], ImageDataset]) -> Subject:
    if path.is_file():
        trained, dataset = _open_file(path, dataset_of)
        has_teacher = trained.network is None
    else:
        trained = open_student(path, opt.checkpoint)
        has_teacher = trained.run.options["distill"] != "none" and not opt.no_teacher
        if has_teacher:
            check_teacher(trained.run)  # before the images, which may have to be decoded
        dataset = dataset_of(trained.run.options, save_dir(trained.run))
    own = trained.run.options["dataset_sha256"] == dataset.fingerprint()
    if trained.run.history and opt.dataset is None:
        check_same(trained.run, "dataset_sha256", dataset.fingerprint())
    if trained.network is not None:
        trained.network.to(device, memory_format=torch.channels_last)
    return Subject(trained, has_teacher, dataset, own, device)


def _open_file(path: Path, dataset_of: Callable[[dict, str], ImageDataset]) -> tuple[TrainedStudent, ImageDataset]:
    """A file of this project, the release, RepDistiller or another: a student, a CNN, or a frozen encoder's head."""
    state = read_file(path)
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no network")
    own = state["options"] if isinstance(state.get("options"), dict) else {}
    dataset, options = dataset_of(own, "./save"), _UNSAID | own
    classes = state.get("classes", dataset.classes)
    size = state.get("image_size", dataset.views.size)
    network = None
    try:
        if "clip_sha256" in state:
            options, state = options | {"model_s": options["model_t"]}, {"teacher_layer": state["model"]}
        elif isinstance(state.get("layer"), dict):
            options = {"model_s": architecture(str(path))} | options
            network = restore_student(options, state, len(classes))
        else:
            options = options | {"model_s": architecture(str(path)), "clip_tn": 0}
            backbone, resolution = load_cnn(str(path), len(classes), Needs())
            network = Classifier(backbone, resolution=resolution).eval()
            state |= {"normalization": cnn_normalization(str(path), backbone)}
    except InputError as error:
        raise InputError(str(error).replace("--path_t ", "")) from error
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not hold a student of the data set's {len(classes)} classes") from error
    run = StoredRun(path.absolute().parent, options | {"distill": path.name, "file": str(path)}, [])
    stored_size = state.get("stored_size", size)
    normalization = state.get("normalization", normalization_of(options["clip_tn"]))
    return TrainedStudent(run, path, state, network, classes, size, normalization, stored_size), dataset


def class_numbers(subject: Subject) -> Tensor:
    """The place of each class's logit in the student's outputs, in the data set's order of classes.

    Raises:
        InputError: the data set has other classes.
    """
    known, asked = subject.trained.classes, subject.dataset.classes
    if set(known) != set(asked):
        other = [name for name in asked if name not in known]
        missing = [name for name in known if name not in asked]
        parts = [f"{what} {listed(names)}" for what, names in (("it has", other), ("it lacks", missing)) if names]
        raise InputError(
            f"{subject.dataset.name} has other classes than {subject.where} was trained on: {' and '.join(parts)}; "
            "use --probe, or --zero_shot where the student understands texts"
        )
    return torch.tensor([known.index(name) for name in asked])


def listed(names: list[str], few: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:few]) + (f" and {len(names) - few} more" if len(names) > few else "")
