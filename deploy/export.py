"""A finished student as files that other programs run: ONNX, torch.export's program, a library's own weights."""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from dataset import ImageDataset, Split
from dataset.loader import eval_batch_size, take
from dataset.views import normalize
from errors import InputError
from evaluation.student import TrainedStudent
from helper.util import accuracy, processor
from models import create_model
from models.heads import Reuser, Student
from models.library import LibraryModel
from models.names import OWN, parse_name

from .predict import open_file, open_onnx

FILES = {"onnx": "model.onnx", "exported": "model.pt2", "safetensors": "model.safetensors"}
BESIDE = ("labels.txt", "preprocess.py", "README.md", "config.json")

# The largest difference allowed between an exported file and its student, relative to outputs larger than 1.
TOLERANCE = 1e-4

# The ranges of 8-bit activations are measured on at most so many training images.
_CALIBRATION = 1000


class Exportable(nn.Module):
    """A student as it is exported: images to logits and embeddings.

    Args:
        student: the network.
        normalization: mean and std of pixels in [0, 1], where 8-bit pixels (B, 3, H, W) go in; None where normalised
            images do.
    """

    def __init__(self, student: nn.Module, normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None):
        super().__init__()
        self.student = student
        self.takes_pixels = normalization is not None
        if self.takes_pixels:
            for name, values in zip(("mean", "std"), normalization, strict=True):
                self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.takes_pixels:
            image = (image.float() / 255 - self.mean) / self.std
        out = self.student(image)
        return out.logits, out.embedding


@contextlib.contextmanager
def new_files(folder: Path, names: list[str], force: bool) -> Iterator[Path]:
    """A temporary folder; its files are moved to where they belong once all of them are made.

    Args:
        folder: where they belong; made where it is missing.
        names: of the files; the last one marks the others as whole.
        force: replace files that are there.

    Raises:
        InputError: a file would be overwritten.
        OSError: the folder cannot be written to.
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise InputError(f"{folder} holds {', '.join(there)}: choose another --out, or overwrite with --force")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is no folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        yield Path(temporary)
        folder.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(temporary) / name, folder / name)


@contextlib.contextmanager
def exporter_errors(what: str) -> Iterator[None]:
    """Turn whatever torch's exporters raise into an InputError of one line, and silence their remarks."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # they raise whatever a network's control flow makes of their proxies
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"torch cannot export {what} ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Exported:
    """A network's file, and what it was made of.

    Attributes:
        path: the file.
        onnx: the same network as an ONNX file, which is timed; the file itself where it is ONNX.
        network: a student's is an ``Exportable``.
        example: a batch of two images, as the file takes them.
    """

    path: Path
    onnx: Path
    network: nn.Module
    example: Tensor


def export(opened: TrainedStudent, form: str, takes_pixels: bool, folder: Path) -> Exported:
    """Write a student as 'onnx', 'exported' or 'safetensors'.

    Args:
        takes_pixels: whether 8-bit pixels go in; else normalised images.
        folder: the files go there.

    Raises:
        InputError: torch's exporters, or the network's library, do not take it.
    """
    if form == "safetensors" and parse_name(opened.run.options["model_s"]).library in OWN:
        raise InputError(
            f"--format safetensors is for the weights of libraries' networks; {opened.path} holds those of "
            f"{opened.run.options['model_s']}: use --format onnx or exported"
        )
    network = Exportable(opened.network, opened.normalization if takes_pixels else None).eval()
    shape = (2, 3, opened.image_size, opened.image_size)
    example = torch.zeros(shape, dtype=torch.uint8 if takes_pixels else torch.float32)
    path, onnx = folder / FILES[form], folder / FILES["onnx"]
    print(f"writing {path.name}", flush=True)
    with exporter_errors(opened.run.options["model_s"]):
        save_onnx(network, example, onnx, ["logits", "embedding"])
        if form == "exported":
            save_program(network, example, path)
    if form == "safetensors":
        safetensors.torch.save_file(library_state(opened), path, {"format": "pt"})
    return Exported(path, onnx, network, example)


def save_onnx(network: nn.Module, example: Tensor, path: Path, outputs: list[str]) -> None:
    """Write a network as ONNX, for any batch size, its weights in the same file.

    Args:
        example: an input of two images: ``pixels`` where they are 8-bit, else ``image``.
        outputs: names of its outputs.
    """
    shapes = ({0: "batch"},)
    names = {"input_names": [input_name(example)], "output_names": outputs}
    torch.onnx.export(
        network, (example,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **names
    )


def input_name(image: Tensor) -> str:
    """The name of an exported file's input."""
    return "pixels" if image.dtype == torch.uint8 else "image"


def save_program(network: nn.Module, example: Tensor, path: Path) -> None:
    """Write a network as torch.export's program, for any batch size."""
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


@torch.no_grad()
def library_state(opened: TrainedStudent) -> dict[str, Tensor]:
    """A student's weights in its library's naming: timm's, torchvision's, or RepDistiller's for the house's networks.

    A student's head is a projection and a classifier. These two linear maps make one, the classifier of the library's
    network.
    """
    backbone, head = opened.network.backbone, opened.network.head
    if isinstance(opened.network, Reuser):
        raise InputError(
            f"the student in {opened.run.folder} ends in a projector and its teacher's classifier, which no library's "
            "network has: use another --format"
        )
    if isinstance(opened.network, Student):
        name, resolution = opened.run.options["model_s"].partition("=")[0], opened.network.resolution
        full = create_model(name, len(opened.classes), resolution=resolution)
        missing = full.load_state_dict(backbone.state_dict(), strict=False).missing_keys
        classifier = [module for module in full.modules() if isinstance(module, nn.Linear)][-1]
        assert len(missing) == len(classifier.state_dict()), missing
        project, classify = head.fit_dim_Net, head.cl_Net
        # In double precision: float32 then cannot tell the one map from the two.
        classifier.weight.copy_(classify.weight.double() @ project.weight.double())
        classifier.bias.copy_(classify.weight.double() @ project.bias.double() + classify.bias.double())
        backbone = full
    state = backbone.library_state() if isinstance(backbone, LibraryModel) else backbone.state_dict()
    return {name: x.clone().contiguous() for name, x in state.items()}


def test_views(dataset: ImageDataset, split: Split, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a split and their test views, (B, 3, H, W) uint8, in batches as large as in a test pass."""
    for index in rows.split(eval_batch_size("cpu", dataset.views.size)):
        images, view = take(split.images, index, torch.device("cpu")), torch.full_like(index, dataset.views.test)
        yield index, dataset.views.student(images, index, view)


def quantize(exported: Exported, dataset: ImageDataset, normalization: tuple) -> None:
    """Turn an ONNX file into one of 8-bit weights and activations (onnxruntime's static quantisation, QDQ).

    Weights are signed, with a scale for each channel. Training images give the ranges of activations.

    Args:
        dataset: its training images calibrate the file.
        normalization: of the images, see ``normalize``.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    count = len(dataset.train)
    rows = torch.linspace(0, count - 1, min(count, _CALIBRATION)).round().long()
    batches = test_views(dataset, dataset.train, rows)
    print(f"quantising {exported.path.name}, calibrated on {len(rows):,} training images", flush=True)

    class Images(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            _, pixels = next(batches, (None, None))
            if pixels is None:
                return None
            image = pixels if exported.network.takes_pixels else normalize(pixels, normalization)
            return {input_name(image): image.numpy()}

    with tempfile.TemporaryDirectory(dir=exported.path.parent) as temporary:
        prepared, quantized = Path(temporary) / "prepared.onnx", Path(temporary) / "quantized.onnx"
        quant_pre_process(exported.path, prepared)
        quantization.quantize_static(
            prepared,
            quantized,
            Images(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        os.replace(quantized, exported.path)


@torch.no_grad()
def check(opened: TrainedStudent, exported: Exported, config: dict, dataset: ImageDataset) -> float | None:
    """Compare an exported file, in its own runtime, with its student, on all test images, in float32.

    It prints the largest difference between outputs, relative to outputs larger than 1, and both accuracies (top-1, %).

    Args:
        config: the content of config.json.

    Returns:
        The file's accuracy; None where the student was trained without labels.

    Raises:
        InputError: a file that is not quantised differs by more than ``TOLERANCE``.
    """
    what = f"{exported.path.name}, {config['quantized']}" if config["quantized"] else exported.path.name
    run, difference, correct, test = open_file(exported.path, config), 0.0, torch.zeros(2), dataset.test
    print(f"checking {what}, on {len(test):,} test images", flush=True)
    for rows, pixels in test_views(dataset, test, torch.arange(len(test))):
        image = normalize(pixels, opened.normalization)
        out = opened.network(image)
        found = run(pixels if exported.network.takes_pixels else image)
        for x, wanted in zip(found, (out.logits, out.embedding), strict=False):
            difference = max(difference, float((x - wanted).abs().max() / wanted.abs().max().clamp(min=1)))
        for place, logits in enumerate((out.logits, found[0])):
            correct[place] += len(rows) * accuracy(logits, test.targets[rows])[0]
    own, accurate = (correct / len(test)).tolist()
    classifies = opened.state.get("test_acc") is not None
    told = f"; accuracy {accurate:.2f}, the student's {own:.2f}" if classifies else ""
    print(f"{what}: largest difference to the student on {len(test)} test images {difference:.1e}{told}")
    if config["quantized"] is None and not difference <= TOLERANCE:
        raise InputError(f"{what} differs from the student by more than {TOLERANCE:g}: nothing is written")
    return accurate if classifies else None


@torch.no_grad()
def check_kernels(opened: TrainedStudent, exported: Exported, config: dict, dataset: ImageDataset) -> dict:
    """Compare an 8-bit file with itself, computed in float32, on all test images; print how far they agree.

    With graph optimisations onnxruntime computes in 8 bits, with instructions that differ from processor to processor;
    without, in float32 between the same 8-bit values.

    Args:
        config: the content of config.json.

    Returns:
        What config.json says of it: ``processor``, its name, and ``same_class``, the share of images (%) that both give
        the same class.
    """
    test, same = dataset.test, 0
    what = f"{exported.path.name}, {config['quantized']}"
    print(f"checking {what}, against itself in float32", flush=True)
    fast, exact = (open_onnx(exported.path, optimized=optimized) for optimized in (True, False))
    for _, pixels in test_views(dataset, test, torch.arange(len(test))):
        image = pixels if exported.network.takes_pixels else normalize(pixels, opened.normalization)
        same += int((fast(image)[0].argmax(1) == exact(image)[0].argmax(1)).sum())
    found = {"processor": processor(), "same_class": 100 * same / len(test)}
    print(f"{what}: computed in float32, it gives {found['same_class']:.2f} % of the images the same class")
    return found
