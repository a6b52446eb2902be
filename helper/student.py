"""The student: a backbone and its head, built for a run."""

import contextlib
import copy
from pathlib import Path

import torch
from torch import nn

from dataset.views import Normalization, normalization_of
from distiller_zoo import Needs, simkd_projector
from errors import InputError
from models import create_classifier, create_student
from models.heads import Classifier, Linear, ReusedHead, Reuser, Student, check_image_size
from models.library import load_into, synchronize_norms
from models.names import OWN, own_file, parse_name
from models.own import check_own_model
from models.weights import read_state, sha256_of

from . import checkpoint
from .teacher import CnnTeacher, EncoderTeacher


def build_student(
    opt, num_classes: int, image_size: int, needs: Needs, teacher: EncoderTeacher | CnnTeacher | None = None
) -> Student | Classifier:
    """The student that the options describe, on the device; its weights depend on the seed, not on the teacher.

    Args:
        num_classes: number of classes.
        image_size: height and width of the images in pixels.
        needs: the method's needs.
        teacher: with ``--joint teacher`` the student is projected to this teacher's own space.

    Raises:
        InputError: the network cannot give what is asked for or take such images, or the weights do not fit.
        OSError: the weights are not there and cannot be downloaded.
    """
    student, left_out = _create(opt, num_classes, needs, teacher.dim if opt.joint == "teacher" else None)
    if needs.reuses:
        student = reuse(student, teacher, image_size, opt.simkd_factor)
    if opt.init_s is not None:
        print(f"{opt.init_s}: " + (f"left out {', '.join(left_out)}" if left_out else "every tensor is used"))
    _check_images(opt, student, image_size)
    student = synchronize_norms(student) if opt.sync_bn else student
    return student.to(opt.device, memory_format=torch.channels_last)


def find_student(opt, needs: Needs, image_size: int | None) -> tuple[Normalization, dict[str, str]]:
    """Find out about the student before there are images, which may take hours to download or to decode.

    It is built once, as a trial.

    Args:
        needs: the method's needs.
        image_size: height and width of the images in pixels; None where only the images tell.

    Returns:
        Mean and std of its images' channels; and by name the hashes of the files of start weights and of the network's
        code, where there are such files.

    Raises:
        InputError: no such file; see also ``build_student``.
        OSError: see ``build_student``.
    """
    if opt.init_s is not None and not Path(opt.init_s).is_file():
        raise InputError(f"--init_s {opt.init_s}: no such file of weights")
    student, _ = _create(opt, num_classes=2, needs=needs, teacher_dim=2)  # no check depends on these numbers
    name = parse_name(opt.model_s)
    if image_size is not None:
        _check_images(opt, student, image_size)
    path = name.path if opt.init_s is None else opt.init_s
    hashes = {"init_sha256": path, "student_sha256": own_file(name) if name.library == "file" else None}
    hashes = {key: sha256_of(file) for key, file in hashes.items() if file is not None}
    return _normalization(opt, student), hashes


def _check_images(opt, student: Student | Classifier, image_size: int) -> None:
    """Raise an InputError where the student cannot take images of a size, or a network of one's own is no student."""
    name = parse_name(opt.model_s)
    if name.library in OWN:
        check_own_model(student.backbone, name, opt.student_resolution or image_size)
    check_image_size(student, opt.model_s, image_size, "--student_resolution")


def _normalization(opt, student: Student | Classifier) -> Normalization:
    """Mean and std of the student's images: those that its start weights were trained with, or else its protocol's.

    A student's file of this project holds them; other weights of a library's network have the library's.
    """
    own, name = normalization_of(bool(opt.clip_tn)), parse_name(opt.model_s)
    if name.library not in (None, *OWN) and (opt.pretrained_s or opt.init_s is not None or name.path is not None):
        own = student.backbone.normalization
    if (path := opt.init_s or name.path) is not None:
        with contextlib.suppress(InputError):  # the file is another project's
            own = tuple(map(tuple, checkpoint.load(Path(path)).get("normalization", own)))
    if own != normalization_of(bool(opt.clip_tn)):
        print(f"{opt.model_s}: its images are normalised as those that its weights were trained on, mean and std {own}")
    return own


def _create(opt, num_classes: int, needs: Needs, teacher_dim: int | None) -> tuple[Student | Classifier, list[str]]:
    """The student, on the CPU, and the names of the tensors of ``--init_s`` that it does not use."""
    torch.manual_seed(opt.seed)
    options = {"resolution": opt.student_resolution, "maps": needs.maps, "pretrained": opt.pretrained_s}
    if opt.clip_tn:
        dim = teacher_dim if opt.joint == "teacher" else opt.feature_dim
        student = create_student(opt.model_s, dim, num_classes, **options)
    else:
        joint = opt.feature_dim if needs.joint else None
        own_classes = 0 if needs.reuses else num_classes
        student = create_classifier(opt.model_s, own_classes, joint, needs.preact_s, **options)
    if opt.init_s is None:
        return student, []
    return student, load_into(student.backbone, read_state(opt.init_s))


def own_code(opt) -> dict[str, bytes]:
    """The files of networks of one's own, which a run keeps, by their names there: student.py and teacher.py."""
    names = {"student.py": opt.model_s}
    if opt.distill != "none" and opt.clip_tn:
        names["teacher.py"] = opt.clip_mode
    parsed = {kept: parse_name(name) for kept, name in names.items()}
    return {kept: own_file(name).read_bytes() for kept, name in parsed.items() if name.library == "file"}


@torch.no_grad()
def reuse(student: Student | Classifier, teacher: EncoderTeacher | CnnTeacher, image_size: int, factor: int) -> Reuser:
    """A student that ends in the teacher's features and in the teacher's classifier, on the CPU.

    Args:
        student: its backbone is taken.
        teacher: an encoder has a head, two linear maps which become one here.
        image_size: height and width of the images in pixels.
        factor: see ``SimKD``.

    Raises:
        InputError: a CNN does not classify the mean of its last map.
    """
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    features = student.eval()(images).features
    if isinstance(teacher, EncoderTeacher):
        project, classify = (layer.to("cpu", torch.float64) for layer in copy.deepcopy(list(teacher.head.children())))
        classifier = Linear(project.in_features, classify.out_features)
        classifier.weight.copy_(classify.weight @ project.weight)
        classifier.bias.copy_(classify(project.bias))
        channels, size = features[-1].shape[1], None
    else:
        maps, _ = teacher.features(images.to(next(teacher.backbone.parameters()).device))
        last, pooled = maps[-2].float(), maps[-1].float()
        classifier = copy.deepcopy([x for x in teacher.backbone.modules() if isinstance(x, nn.Linear)][-1]).cpu()
        mean = last.mean(dim=(2, 3))
        if mean.shape != pooled.shape or (mean - pooled).norm() > 0.05 * pooled.norm():
            raise InputError("SimKD needs a CNN teacher that classifies the mean of its last map; this one does not")
        channels, size = features[-2].shape[1], last.shape[-1]
    width = classifier.in_features
    projector = simkd_projector(channels, max(width // factor, 1), width, maps=size is not None)
    return Reuser(student.backbone, ReusedHead(projector, classifier, size), student.resolution)


def model_file(
    student: Student | Classifier, teacher: EncoderTeacher | CnnTeacher | None, options: dict, image_facts: dict
) -> dict:
    """The content of a student's file: its backbone, its head, and the teacher's head where there is one.

    Args:
        options: the run's recorded options.
        image_facts: see ``Loaders.image_facts``.
    """
    layers = {"model": student.backbone.state_dict(), "layer": student.head.state_dict()}
    if teacher is not None and teacher.head is not None:
        layers["teacher_layer"] = teacher.head.state_dict()
    return layers | {"arch": options["model_s"], "options": options} | image_facts
