"""A finished run's student, opened."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dataset import ImageDataset, open_dataset
from dataset.decode import square, upright_rgb
from dataset.views import normalize
from distiller_zoo import simkd_projector
from errors import InputError
from helper import checkpoint
from helper.names import sized_name
from helper.records import StoredRun, read_run
from models import create_classifier, create_student
from models.heads import Classifier, Linear, ReusedHead, Reuser, Student
from models.names import at, parse_name
from models.own import give_again
from models.weights import sha256_of


def restore_student(options: dict, state: dict, num_classes: int) -> Student | Classifier:
    """The student of a run, with the weights of one of its files, on the CPU, in evaluation mode.

    Args:
        options: the run's: ``model_s``, ``student_resolution``, ``clip_tn`` and ``pretrained_s``.
        state: the content of the file.
        num_classes: number of classes.

    Raises:
        KeyError, RuntimeError, InputError: the file does not fit the options.
    """
    sized = {"resolution": options["student_resolution"]}
    layer = state["layer"]
    # The weights know the joint space's width, which is the teacher's own or what the options say.
    dim = len(layer["fit_dim_Net.weight"]) if "fit_dim_Net.weight" in layer else None
    name = parse_name(options["model_s"])
    began_from_file, name = name.path is not None, str(name._replace(path=None))  # that file may be gone by now
    if "projector.0.weight" in layer:  # SimKD's
        student = create_classifier(name, 0, maps=bool(layer["size"]), **sized)
        student = Reuser(student.backbone, _reused_head(layer), student.resolution)
    elif options["clip_tn"]:
        student = create_student(name, dim, num_classes, **sized)
    else:
        student = create_classifier(name, num_classes, dim, **sized)
    net = getattr(student.backbone, "net", None)
    if hasattr(net, "transform_input"):  # torchvision's Inceptions normalise otherwise from published weights
        net.transform_input = bool(began_from_file or options["pretrained_s"])
    student.backbone.load_state_dict(state["model"])
    student.head.load_state_dict(layer)
    return student.eval()


def student_name(run: StoredRun) -> str:
    """The name of a run's backbone; the code of a network of one's own is the run's copy.

    Raises:
        InputError: the copy is missing, or has changed since.
    """
    name = run.options["model_s"]
    if parse_name(name).library != "file":
        return name
    path = run.folder / "student.py"
    check_code(path, name, run.options["student_sha256"])
    return at(name, path)


def check_code(path: Path, name: str, sha256: str) -> None:
    """Raise an InputError where a run's copy of a network's code is missing, or has changed since."""
    if not path.is_file() or sha256_of(path) != sha256:
        what = "has changed since the run" if path.is_file() else "is missing"
        raise InputError(f"{path}, the code of {name}, {what}: put the file back as it was")


def _reused_head(layer: dict[str, Tensor]) -> ReusedHead:
    """SimKD's head, of the sizes of its state dict."""
    size, (classes, width) = int(layer["size"]) or None, layer["classifier.weight"].shape
    channels, hidden = layer["projector.0.weight"].shape[1], len(layer["projector.0.weight"])
    projector = simkd_projector(channels, hidden, width, maps=size is not None)
    return ReusedHead(projector, Linear(width, classes), size)


def model_path(run: StoredRun, which: str = "best") -> Path:
    """The file of a run's student after its ``best`` or its ``last`` epoch; any other word is the path of a file."""
    if which not in ("best", "last"):
        return Path(which)
    stem = sized_name(run.options["model_s"], run.options["student_resolution"])
    return run.folder / f"{stem}_{which}.pth"


@dataclass(frozen=True)
class TrainedStudent:
    """A finished run's student, and what has to be known to use it.

    Attributes:
        run: its options and metrics.
        path: the file that holds its weights.
        state: the file's content: the student's weights, the teacher's head where there is one, the epoch's record.
        network: on the CPU, in evaluation mode.
        classes: their names, in the order of the logits.
        image_size: height and width in pixels of the images that it takes; a student that was trained on enlarged
            images enlarges them itself.
        normalization: mean and std of each channel.
        stored_size: pictures are resized to this many pixels, before their centre of ``image_size`` is cut out.
    """

    run: StoredRun
    path: Path
    state: dict
    network: Student | Classifier
    classes: list[str]
    image_size: int
    normalization: tuple[tuple[float, ...], tuple[float, ...]]
    stored_size: int


def open_student(run: StoredRun | str | Path, which: str = "best", module: nn.Module | None = None) -> TrainedStudent:
    """The student of a finished run; the data set need not be there.

    Args:
        run: its folder, or what ``read_run`` made of it.
        which: see ``model_path``.
        module: see ``load_student``.

    Raises:
        InputError: not a finished run, or a file that is missing, corrupt or of another student.
        OSError: a file cannot be read.
    """
    run = run if isinstance(run, StoredRun) else read_run(run)
    path = model_path(run, which)
    if not path.is_file():
        told = "" if which in ("best", "last") else " (best, last, or the path of a student's file)"
        raise InputError(f"{run.folder} holds no weights: {path} is missing{told}")
    state = checkpoint.load(path)
    if module is not None:
        give_again(run.options["model_s"], module)
    try:
        facts = {name: state[name] for name in ("classes", "image_size", "normalization", "stored_size")}
        network = restore_student(run.options | {"model_s": student_name(run)}, state, len(facts["classes"]))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} is not a file of the student in {run.folder}") from error
    return TrainedStudent(run, path, state, network, **facts)


def open_run_dataset(run: StoredRun, data_dir: str | None = None) -> ImageDataset:
    """The data set of a run.

    Args:
        data_dir: where it is now, if not where the run had it.

    Raises:
        InputError: the data set has changed since.
        OSError: it is not there.
    """
    where = {"save_dir": str(run.folder.absolute().parents[1])}
    where |= {} if data_dir is None else {"data_dir": data_dir, "data_list": None}
    dataset = open_dataset(run.options | where)
    if dataset.fingerprint() != run.options["dataset_sha256"]:
        raise InputError(f"the run in {run.folder} was trained with another dataset than is there now")
    return dataset


class Predictor(nn.Module):
    """A finished student as a plain network: normalised images (B, 3, H, W) to logits (B, classes).

    ``embed`` gives its embeddings (B, D); ``student`` is the network beneath, which gives both as ``Outputs``.
    """

    def __init__(self, student: Student | Classifier):
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        return self.student(image).logits

    def embed(self, image: Tensor) -> Tensor:
        return self.student(image).embedding


def _prepare(
    picture: Image.Image, size: int, normalization: tuple[tuple[float, ...], tuple[float, ...]] | None, stored_size: int
) -> Tensor:
    border = (stored_size - size) // 2
    pixels = torch.from_numpy(np.array(square(upright_rgb(picture), stored_size))).permute(2, 0, 1)
    pixels = pixels[:, border : border + size, border : border + size].contiguous()
    return pixels if normalization is None else normalize(pixels[None], normalization)[0]


def image_transform(
    size: int, normalization: tuple[tuple[float, ...], tuple[float, ...]] | None, stored_size: int
) -> Callable[[Image.Image], Tensor]:
    """From a PIL image of any size and mode to the tensor (3, size, size) that the run's test pass sees.

    It raises a ``BadImage`` where ``upright_rgb`` does.

    Args:
        size: height and width in pixels.
        normalization: mean and std of each channel; None for 8-bit pixels.
        stored_size: see ``TrainedStudent``.
    """
    # A function of the module, so that data loaders' processes can be given it.
    return functools.partial(_prepare, size=size, normalization=normalization, stored_size=stored_size)
