"""A finished run's student, opened."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToTensor

from dataset import ImageDataset
from dataset.decode import upright_rgb
from errors import InputError
from helper import checkpoint
from helper.data import normalization_of, open_dataset
from helper.names import sized_name
from helper.records import StoredRun, read_run
from models import create_classifier, create_student
from models.heads import Classifier, Student


def restore_student(options: dict, state: dict, num_classes: int) -> Student | Classifier:
    """The student of a run, with the weights of one of its files, on the CPU, in evaluation mode.

    Args:
        options: of the run's options.json; older ones lack some.
        state: what ``model_file`` gave.
        num_classes: number of classes.

    Raises:
        KeyError, RuntimeError, InputError: the file does not fit the options.
    """
    sized = {"resolution": options.get("student_resolution")}
    # The weights know the joint space's width, which is the teacher's own or what the options say.
    dim = len(state["layer"]["fit_dim_Net.weight"]) if state["layer"] else None
    name, began_from_file, _ = options["model_s"].partition("=")  # that file need not be there any more
    if options.get("clip_tn", 1):
        student = create_student(name, dim, num_classes, **sized)
    else:
        student = create_classifier(name, num_classes, dim, **sized)
    net = getattr(student.backbone, "net", None)
    if hasattr(net, "transform_input"):  # torchvision's Inceptions normalise otherwise from published weights
        net.transform_input = bool(began_from_file or options.get("pretrained_s"))
    student.backbone.load_state_dict(state["model"])
    student.head.load_state_dict(state["layer"])
    return student.eval()


def model_path(run: StoredRun, which: str = "best") -> Path:
    """The file of a run's student: of its best epoch, of its last, or any other that is named by its path."""
    if which not in ("best", "last"):
        return Path(which)
    stem = sized_name(run.options["model_s"], run.options.get("student_resolution"))
    return run.folder / f"{stem}_{which}.pth"


@dataclass(frozen=True)
class TrainedStudent:
    """A finished run's student, and what has to be known to use it.

    Attributes:
        run: its options and metrics.
        path: the file that its weights are from.
        state: that file's content: beside the student's weights, the teacher's head where there is one, and the
            epoch's record.
        network: on the CPU, in evaluation mode.
        classes: their names, in the order of the logits.
        image_size: height and width in pixels of the images that it takes; it enlarges them itself where it was
            trained to.
        normalization: mean and std of each channel.
        stored_size: what pictures are resized to before their centre of ``image_size`` is cut out; None for that.
    """

    run: StoredRun
    path: Path
    state: dict
    network: Student | Classifier
    classes: list[str]
    image_size: int
    normalization: tuple[tuple[float, ...], tuple[float, ...]]
    stored_size: int | None = None


def open_student(run: StoredRun | str | Path, which: str = "best") -> TrainedStudent:
    """The student of a finished run. The data set has to be there only for runs older than the facts in their files.

    Args:
        run: its folder, or what ``read_run`` made of it.
        which: see ``model_path``.

    Raises:
        InputError: not a finished run, or a file that is missing, corrupt or of another student.
        OSError: a file cannot be read; or an old run's data set is not there.
    """
    run = run if isinstance(run, StoredRun) else read_run(run)
    path = model_path(run, which)
    if not path.is_file():
        told = "" if which in ("best", "last") else " (best, last, or the path of a student's file)"
        raise InputError(f"{run.folder} holds no weights: {path} is missing{told}")
    state = checkpoint.load(path)
    other = f"{path} is not a file of the student in {run.folder}"
    if not {"model", "layer"} <= state.keys():
        raise InputError(other)
    if "classes" in state:
        classes, size, normalization = state["classes"], state["image_size"], state["normalization"]
        stored_size = state.get("stored_size")
    else:
        dataset = open_dataset(run.options)
        classes, size, stored_size = dataset.classes, dataset.views.size, dataset.test.images.shape[-1]
        normalization = normalization_of(run.options)
    try:
        network = restore_student(run.options, state, len(classes))
    except (KeyError, RuntimeError) as error:
        raise InputError(other) from error
    return TrainedStudent(run, path, state, network, classes, size, normalization, stored_size)


def open_run_dataset(run: StoredRun, data_dir: str | None = None) -> ImageDataset:
    """The data set of a run.

    Args:
        data_dir: where it is, if not where the run had it.

    Raises:
        InputError: it is another by now.
        OSError: it is not there.
    """
    where = {"save_dir": str(run.folder.absolute().parents[1])} | ({} if data_dir is None else {"data_dir": data_dir})
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


def image_transform(
    size: int, normalization: tuple[tuple[float, ...], tuple[float, ...]] | None, stored_size: int | None = None
) -> Compose:
    """From a PIL image to the tensor (3, size, size) that a student takes: what its run's test pass sees.

    Args:
        size: height and width in pixels.
        normalization: mean and std of each channel; None for 8-bit pixels.
        stored_size: see ``TrainedStudent``.
    """
    resize = [upright_rgb, Resize(stored_size or size, InterpolationMode.BICUBIC), CenterCrop(size)]
    if normalization is None:
        return Compose([*resize, PILToTensor()])
    return Compose([*resize, ToTensor(), Normalize(*normalization)])
