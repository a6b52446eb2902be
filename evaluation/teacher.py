"""The teacher of a finished run, opened again."""

import torch

from dataset import ImageDataset
from distiller_zoo import Needs
from errors import InputError
from helper.encoder import load_encoder
from helper.records import StoredRun
from helper.teacher import (
    CnnTeacher,
    EncoderTeacher,
    architecture,
    cnn_normalization,
    load_cnn,
    open_embeddings,
)
from models.create import encoder_sha256
from models.encoders import FrozenEncoder
from models.heads import Classifier, TeacNet
from models.names import at, parse_name
from models.weights import sha256_of


def open_teacher(
    run: StoredRun,
    state: dict,
    dataset: ImageDataset,
    device: str,
    num_classes: int | None = None,
    encode_once: bool = False,
) -> EncoderTeacher | CnnTeacher:
    """The teacher of a finished run, with the head that it had when its student was saved.

    Args:
        state: the content of the student's file.
        dataset: the teacher is asked for its images. The run's bank holds the embeddings of the run's own test split.
        device: 'cpu' or 'cuda'.
        num_classes: of the run, where the data set is not the run's own.
        encode_once: make a bank of another data set too, with one view of each image.

    Raises:
        InputError: the run has no teacher, or its teacher or data set has changed.
        OSError: the teacher's weights are missing.
    """
    own = num_classes is None
    if own:
        check_same(run, "dataset_sha256", dataset.fingerprint())
    same_device = device == run.options["device"]
    amp = run.options["amp"] if same_device else "off"
    network, head = open_teacher_network(run, state, num_classes or len(dataset.classes), device, amp)
    if not isinstance(network, FrozenEncoder):
        seen = cnn_normalization(run.options["path_t"], network.backbone), state["normalization"]
        teacher = CnnTeacher(network.backbone, head, amp, False, network.resolution, *seen)
        return teacher.to(device, memory_format=torch.channels_last)
    # One view is enough, as the test split has no more. A bank of another device is of another precision.
    views = min(run.options["teacher_views"], 1) if own and same_device else int(encode_once)
    embed = open_embeddings(dataset, network, views, str(run.folder.absolute().parents[1]), device, amp)
    return EncoderTeacher(embed, head, dim=network.dim).to(device)


def open_teacher_network(
    run: StoredRun, state: dict, num_classes: int, device: str = "cpu", amp: str = "off"
) -> tuple[FrozenEncoder | Classifier, TeacNet | None]:
    """A finished run's frozen encoder, or its CNN; and the head on it, where it had one.

    Args:
        state: see ``open_teacher``.
        num_classes: number of classes.
        device, amp: an encoder is made for these.

    Raises:
        InputError, OSError: see ``open_teacher``.
    """
    options = run.options
    if options["distill"] == "none":
        raise InputError(f"the run in {run.folder} has no teacher: it was trained with --distill none")
    if options["clip_tn"]:
        network = load_encoder(teacher_name(run), options["clip_root"], device, amp, options["teacher_resolution"])
        check_same(run, "clip_sha256", network.sha256)
        return network, _restore_head(run, state, network.dim)
    backbone, resolution = load_cnn(options["path_t"], num_classes, Needs())
    check_same(run, "teacher_sha256", sha256_of(options["path_t"]))
    return Classifier(backbone, resolution=resolution).eval(), _restore_head(run, state, backbone.num_features)


def teacher_name(run: StoredRun) -> str:
    """The name of a run's frozen encoder; the code of a network of one's own is the run's copy."""
    name = run.options["clip_mode"]
    return at(name, run.folder / "teacher.py") if parse_name(name).library == "file" else name


def check_teacher(run: StoredRun) -> None:
    """Look whether the files of a run's teacher are those that it had; nothing is built.

    Raises:
        InputError: the teacher is another by now.
        OSError: its weights are missing.
    """
    options = run.options
    if options["clip_tn"]:
        check_same(run, "clip_sha256", encoder_sha256(teacher_name(run), options["clip_root"]))
    else:
        architecture(options["path_t"])
        check_same(run, "teacher_sha256", sha256_of(options["path_t"]))


def check_same(run: StoredRun, name: str, value: str) -> None:
    """Raise an InputError where a hash is not the one that a run recorded by that name."""
    if run.options[name] != value:
        raise InputError(f"the run in {run.folder} was trained with another {name.split('_')[0]} than is there now")


def _restore_head(run: StoredRun, state: dict, dim: int) -> TeacNet | None:
    """The teacher's head, where the student's file holds one."""
    if "teacher_layer" not in state:
        return None
    layer = state["teacher_layer"]
    try:
        head = TeacNet(dim, *layer["cl_Net.weight"].shape[::-1])
        head.load_state_dict(layer)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{run.folder}: its student's file does not fit its options.json") from error
    return head
