"""The teacher: a frozen encoder's embeddings and the head on them, or a frozen CNN."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import ImageDataset
from dataset.loader import Batch
from dataset.views import CIFAR100_NORMALIZATION, Normalization
from distiller_zoo import Needs
from errors import InputError
from models import check_model_name, create_classifier, create_model, model_dict
from models.encoders import FrozenEncoder
from models.heads import Classifier, Outputs, TeacNet, check_image_size, enlarge
from models.library import own_names, synchronize_norms
from models.names import OWN, parse_name
from models.weights import load_weights, named_tensors, read_file, sha256_of

from .bank import OnTheFly, open_bank
from .encoder import KnownEncoder, encoder_facts, load_encoder
from .runtime import autocast, teacher_precision


class EncoderTeacher(nn.Module):
    """A frozen encoder and its head, if it has one; together they turn a batch into the teacher's outputs.

    Without a head the joint space is the encoder's own, and there are no logits.

    Args:
        embed: turns (split, index, view) into embeddings: a bank, or a fresh encoding. If it has a ``lookup_device``,
            it is given index and view there. None until ``open`` is called.
        head: the projection and the classifier; frozen when its parameters need no gradient.
        dim: width of the encoder's embedding; needed without a head.
        encoder: gives the embeddings that ``open`` opens.
    """

    def __init__(
        self,
        embed: Callable[[str, Tensor, Tensor], Tensor] | None,
        head: TeacNet | None,
        dim: int | None = None,
        encoder: KnownEncoder | None = None,
    ):
        super().__init__()
        self.embed = embed
        self.encoder = encoder
        self.head = head
        self.dim = dim if head is None else head.fit_dim_Net.in_features

    @property
    def trains_head(self) -> bool:
        """Whether the teacher has a head that is trained beside the student, by its own cross-entropy."""
        return self.head is not None and self.head.fit_dim_Net.weight.requires_grad

    def open(self, opt, dataset: ImageDataset) -> None:
        """Open the embeddings of a data set's images; a bank encodes what it lacks, which may take hours on a CPU.

        Raises:
            InputError, OSError: see ``open_bank``.
        """
        self.embed = open_embeddings(dataset, self.encoder, opt.teacher_views, opt.save_dir, opt.device, opt.amp)

    def forward(self, split: str, batch: Batch) -> Outputs:
        on_host = getattr(self.embed, "lookup_device", batch.index.device) != batch.index.device
        index, view = batch.host if on_host else (batch.index, batch.teacher_view)
        x = self.embed(split, index, view) if batch.mix is None else self.embed(split, index, view, batch.mix)
        if self.head is None:
            return Outputs(x, None, [x])
        embedding, logits = self.head(x)
        return Outputs(embedding, logits, [x], head_logits=logits)


class CnnTeacher(nn.Module):
    """A frozen CNN, which sees the student's own view (RepDistiller's protocol), normalised as it was trained.

    Where colours are changed for the student alone, it sees the view before that.

    Args:
        backbone: the network with its classifier.
        head: projects the pooled features to the joint space, for the methods that act there. Its own classifier's
            cross-entropy trains it, as with a frozen encoder. None where the method does not need it.
        amp: see ``autocast``.
        preact: give the maps as they are before their last ReLU.
        resolution: pixels that its input is enlarged to; None for the images' own.
        normalization: mean and std of the images that it was trained on.
        given: mean and std of the student's images; None where they are the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: TeacNet | None,
        amp: str,
        preact: bool = False,
        resolution: int | None = None,
        normalization: Normalization = CIFAR100_NORMALIZATION,
        given: Normalization | None = None,
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.head = head
        self.amp = amp
        self.preact = preact
        self.resolution = resolution
        self.renormalizes = given not in (None, normalization)
        if self.renormalizes:
            (mean, std), (mean_s, std_s) = (torch.tensor(x)[..., None, None] for x in (normalization, given))
            self.register_buffer("scale", std_s / std, persistent=False)
            self.register_buffer("shift", (mean_s - mean) / std, persistent=False)

    @property
    def trains_head(self) -> bool:
        """Whether the teacher has a head, which is then trained beside the student, by its own cross-entropy."""
        return self.head is not None

    def open(self, opt, dataset: ImageDataset) -> None:
        """A CNN sees the student's own images: it has no embeddings to open."""

    def features(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps and pooled features, and logits, of the student's images."""
        if self.renormalizes:
            image = image * self.scale + self.shift
        return self.backbone(enlarge(image, self.resolution), is_feat=True, preact=self.preact)

    def forward(self, split: str, batch: Batch) -> Outputs:
        with torch.no_grad(), autocast(batch.image.device.type, self.amp):
            features, logits = self.features(batch.image if batch.plain is None else batch.plain)
        pooled = features[-1].float()
        embedding, head_logits = (pooled, None) if self.head is None else self.head(pooled)
        return Outputs(embedding, logits.float(), features, head_logits)


def find_teacher(opt) -> tuple[dict | None, dict[str, str]]:
    """Find the teacher's facts and hashes before it is built and before there are images.

    This checks that its files are there and of the right kind; see ``encoder_facts``.

    Returns:
        The facts of a frozen encoder, or None for a CNN; and the hashes of the teacher's files, by name. Without a
        teacher None and no hashes.

    Raises:
        InputError, OSError: a file is missing and cannot be downloaded, or is of the wrong kind.
    """
    if getattr(opt, "distill", None) == "none":
        return None, {}
    if opt.clip_tn:
        facts = encoder_facts(opt.clip_mode, opt.clip_root, opt.teacher_resolution, opt.save_dir)
        if opt.path_t is None:
            return facts, {"clip_sha256": facts["sha256"]}
        check_head(opt.path_t, facts)
        return facts, {"clip_sha256": facts["sha256"], "head_sha256": sha256_of(opt.path_t)}
    return None, {"teacher_sha256": sha256_of(opt.path_t)}  # the parser has checked the CNN


def build_teacher(
    opt, facts: dict | None, num_classes: int, needs: Needs | None = None, given: Normalization | None = None
) -> EncoderTeacher | CnnTeacher:
    """The teacher that the options describe, on the device.

    All of it is frozen but for a head that is trained with the student. ``open`` opens an encoder's embeddings later.

    Args:
        facts: the result of ``find_teacher``.
        num_classes: number of classes.
        needs: the method's needs from a CNN; a head alone has none.
        given: mean and std of the student's images; a CNN sees these.

    Raises:
        InputError, OSError: its file does not fit.
    """
    if facts is None:
        backbone, resolution = load_cnn(opt.path_t, num_classes, needs)
        torch.manual_seed(opt.seed)
        head = TeacNet(backbone.num_features, opt.feature_dim, num_classes) if needs.joint else None
        seen = cnn_normalization(opt.path_t, backbone), given
        teacher = CnnTeacher(backbone, head, opt.amp, needs.preact_t, resolution, *seen)
        return teacher.to(opt.device, memory_format=torch.channels_last)
    where = (opt.clip_mode, opt.clip_root, opt.device, opt.amp, opt.teacher_resolution)
    encoder = KnownEncoder(facts, functools.partial(load_encoder, *where))
    head = None
    if opt.path_t is not None:
        head = load_head(opt.path_t, facts, opt.feature_dim, num_classes)
    elif opt.joint == "projected":
        torch.manual_seed(opt.seed)
        head = TeacNet(encoder.dim, opt.feature_dim, num_classes)
    return EncoderTeacher(None, head, encoder.dim, encoder).to(opt.device)


def open_embeddings(
    dataset: ImageDataset,
    encoder: FrozenEncoder | KnownEncoder,
    teacher_views: int,
    save_dir: str,
    device: str,
    amp: str,
) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A bank of ``teacher_views`` views, built if it is missing; for 0 views, the encoder itself."""
    if teacher_views == 0:
        return OnTheFly(dataset, encoder, torch.device(device))
    root = Path(save_dir) / "teacher_bank"
    precision = teacher_precision(device, amp, encoder.published)
    return open_bank(root, dataset, encoder, teacher_views, precision, torch.device(device))


def build_cnn(opt, num_classes: int, image_size: int) -> Classifier:
    """The CNN that train_teacher.py trains from scratch, on the device.

    Args:
        num_classes: number of classes.
        image_size: height and width of the images in pixels.

    Raises:
        InputError: the network cannot take the images.
    """
    torch.manual_seed(opt.seed)
    cnn = create_classifier(opt.model, num_classes, resolution=opt.teacher_resolution)
    check_image_size(cnn, opt.model, image_size, "--teacher_resolution")
    cnn = synchronize_norms(cnn) if opt.sync_bn else cnn
    return cnn.to(opt.device, memory_format=torch.channels_last)


def check_cnn(opt, image_size: int | None) -> None:
    """Try to build the CNN that ``build_cnn`` builds, before there are images.

    Args:
        image_size: height and width of the images in pixels; None where only the images tell.

    Raises:
        InputError: see ``build_cnn``.
    """
    cnn = create_classifier(opt.model, 2, resolution=opt.teacher_resolution)
    if image_size is not None:
        check_image_size(cnn, opt.model, image_size, "--teacher_resolution")


def teacher_file(teacher: EncoderTeacher | Classifier, options: dict) -> dict:
    """The content of a teacher's file: a head with the SHA-256 of its encoder, a CNN with its architecture.

    Args:
        options: the run's recorded options.
    """
    if isinstance(teacher, EncoderTeacher):
        return {"model": teacher.head.state_dict(), "clip_sha256": options["clip_sha256"], "options": options}
    about = {"arch": options["model"], "resolution": options["teacher_resolution"], "options": options}
    return {"model": teacher.backbone.state_dict(), "normalization": CIFAR100_NORMALIZATION} | about


def _read(path: str) -> dict:
    """The checkpoint that ``--path_t`` names."""
    if not Path(path).is_file():
        raise InputError(f"--path_t {path}: no such file")
    state = read_file(path)
    try:
        model = named_tensors(state, path)
    except InputError:
        raise InputError(
            f"--path_t {path} holds no model: give a frozen encoder's head that train_teacher.py wrote, or a CNN"
        ) from None
    return state | {"model": model}


def architecture(path: str) -> str | None:
    """Which CNN a checkpoint holds; None for the head of a frozen encoder.

    Our own files say so, in the grammar of ``models.names``, and so do those of timm's training script. RepDistiller's
    teachers are in a folder that begins with the name, resnet32x4_vanilla; its students' files begin with it
    themselves, resnet8x4_best.pth.

    Raises:
        InputError: the file is neither, or does not tell.
    """
    return _architecture(path, _read(path))


def _architecture(path: str, state: dict) -> str | None:
    """``architecture`` of a file that was read."""
    if "clip_sha256" in state:
        return None
    told = (Path(path).absolute().parent.name, Path(path).stem)
    named = [name for name in model_dict if any(text == name or text.startswith(f"{name}_") for text in told)]
    arch = state.get("arch") or max(named, key=len, default=None)
    if isinstance(state.get("args"), argparse.Namespace) and arch == getattr(state["args"], "model", None):
        arch = f"timm:{arch}"
    if parse_name(arch or "").library in OWN:  # the code is not run that a file of weights names
        raise InputError(
            f"--path_t {path} holds {arch}, a network of one's own: give its weights to a frozen encoder, "
            "--clip_mode FILE.py:FUNCTION=WEIGHTS"
        )
    try:
        check_model_name(arch or "")
    except ValueError:
        raise InputError(
            f"--path_t {path} does not say which CNN it holds, and neither its name nor its folder's begins with a "
            "CNN's, as RepDistiller's resnet32x4_vanilla does: rename the folder"
        ) from None
    return arch


def _check_shapes(path: str, state: dict, model: nn.Module, check: str) -> None:
    """Raise an InputError where a state dict's names and shapes are not the model's."""
    found = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if found != wanted:
        different = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise InputError(
            f"--path_t {path} has another shape: {different} is {found.get(different)}, "
            f"this run needs {wanted.get(different)} (check {check})"
        )


def load_cnn(path: str, num_classes: int, needs: Needs) -> tuple[nn.Module, int | None]:
    """A CNN with its classifier, and the pixels that its input is enlarged to, from our checkpoint or RepDistiller's.

    Raises:
        InputError: the file is no such checkpoint or has another number of classes, or the CNN lacks the needed maps.
    """
    state = _read(path)
    arch, resolution = _architecture(path, state), state.get("resolution")
    model = create_model(arch, num_classes, maps=needs.maps, preact=needs.preact_t, resolution=resolution)
    weights = own_names(model, state["model"])
    _check_shapes(path, weights, model, "--dataset; a student under the paper's protocol has no classifier of its own")
    load_weights(model, weights)
    return model, resolution


def cnn_normalization(path: str, backbone: nn.Module) -> Normalization:
    """Mean and std of a CNN's training images: its file's, or else its library's or RepDistiller's.

    Args:
        backbone: the network that ``load_cnn`` gave.
    """
    other = getattr(backbone, "normalization", CIFAR100_NORMALIZATION)
    return tuple(map(tuple, _read(path).get("normalization", other)))


def check_head(path: str, facts: dict) -> dict:
    """Read a head's file, which ``train_teacher.py`` must have trained on this encoder.

    Args:
        facts: the encoder's, see ``encoder_facts``.

    Raises:
        InputError: the file holds no head, or one that was trained on another encoder.
    """
    state = _read(path)
    if "clip_sha256" not in state:
        raise InputError(f"--path_t {path} is not a frozen encoder's head, as train_teacher.py writes it")
    if state["clip_sha256"] != facts["sha256"]:
        raise InputError(
            f"--path_t {path} was trained on another encoder (SHA-256 {state['clip_sha256'][:12]}) than "
            f"--clip_mode {facts['name']} ({facts['sha256'][:12]}); train a head for this one"
        )
    return state


def load_head(path: str, facts: dict, feature_dim: int, num_classes: int) -> TeacNet:
    """The frozen head that ``train_teacher.py`` trained.

    Args:
        facts: its encoder's, see ``encoder_facts``.

    Raises:
        InputError: the file holds no head, or one of another shape or encoder.
    """
    state = check_head(path, facts)
    head = TeacNet(facts["dim"], feature_dim, num_classes)
    _check_shapes(path, state["model"], head, "--feature_dim, --dataset and --clip_mode")
    head.load_state_dict(state["model"])
    return head.requires_grad_(False)
