"""The teacher: a frozen CLIP's embeddings and the head on them, or a frozen CNN."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import ImageDataset
from dataset.loader import Batch
from distiller_zoo import Networks
from models import create_model, model_dict
from models.clip_teacher import ImageEncoder
from models.heads import Classifier, Outputs, Student, TeacNet
from models.weights import sha256_of

from . import checkpoint
from .bank import OnTheFly, open_bank
from .run import Run
from .runtime import DTYPES, autocast, teacher_precision


class ClipTeacher(nn.Module):
    """Turns a batch into the teacher's outputs.

    Args:
        embed: (split, index, view) to embeddings; a bank, or a fresh encoding. One with a ``lookup_device`` is given
            index and view there.
        head: the projection and the classifier; frozen when its parameters need no gradient.
    """

    def __init__(self, embed: Callable[[str, Tensor, Tensor], Tensor], head: TeacNet):
        super().__init__()
        self.embed = embed
        self.head = head

    def forward(self, split: str, batch: Batch) -> Outputs:
        on_host = getattr(self.embed, "lookup_device", batch.index.device) != batch.index.device
        index, view = batch.host if on_host else (batch.index, batch.teacher_view)
        x = self.embed(split, index, view)
        embedding, logits = self.head(x)
        return Outputs(embedding, logits, [x], head_logits=logits)


class CnnTeacher(nn.Module):
    """A frozen CNN, which sees the student's own view (RepDistiller's protocol).

    Args:
        backbone: with its classifier.
        head: projects the pooled features to the joint space, for the methods that act there; trained by its own
            classifier's cross-entropy, as a CLIP's. None where no method asks for it.
        amp: see ``autocast``.
        preact: give the maps as they are before their last ReLU.
    """

    def __init__(self, backbone: nn.Module, head: TeacNet | None, amp: str, preact: bool = False):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.head = head
        self.amp = amp
        self.preact = preact

    def forward(self, split: str, batch: Batch) -> Outputs:
        with torch.no_grad(), autocast(batch.image.device.type, self.amp):
            features, logits = self.backbone(batch.image, is_feat=True, preact=self.preact)
        pooled = features[-1].float()
        embedding, head_logits = (pooled, None) if self.head is None else self.head(pooled)
        return Outputs(embedding, logits.float(), features, head_logits)


def load_encoder(clip_mode: str, clip_root: str, device: str, amp: str) -> ImageEncoder:
    """The frozen encoder in the precision that ``teacher_precision`` gives."""
    dtype = DTYPES[teacher_precision(device, amp)]
    return ImageEncoder(clip_mode, clip_root, dtype).to(device)


def open_embeddings(
    dataset: ImageDataset, encoder: ImageEncoder, teacher_views: int, save_dir: str, device: str, amp: str
) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A bank of ``teacher_views`` views, built where it is missing, or for 0 the encoder itself."""
    if teacher_views == 0:
        return OnTheFly(dataset, encoder, torch.device(device))
    root = Path(save_dir) / "teacher_bank"
    return open_bank(root, dataset, encoder, teacher_views, teacher_precision(device, amp), torch.device(device))


def build_teacher(opt, dataset: ImageDataset, run: Run, joint: bool = True, preact: bool = False):
    """The teacher that the options describe, a ``ClipTeacher`` or a ``CnnTeacher``, on the device.

    Frozen but for a head that is trained jointly; a CLIP's bank is built where it is missing. Notes in the run what
    the teacher's weights are.

    Args:
        joint: whether the method needs a CNN's pooled features projected to the joint space.
        preact: whether it needs a CNN's maps as they are before their last ReLU.

    Raises:
        ValueError, OSError: what loading the weights and opening the bank raise.
    """
    num_classes = len(dataset.classes)
    if not opt.clip_tn:
        run.record(teacher_sha256=sha256_of(opt.path_t))
        backbone = load_cnn(opt.path_t, num_classes)
        torch.manual_seed(opt.seed)
        head = TeacNet(backbone.num_features, opt.feature_dim, num_classes) if joint else None
        teacher = CnnTeacher(backbone, head, opt.amp, preact)
        return teacher.to(opt.device, memory_format=torch.channels_last)
    encoder = load_encoder(opt.clip_mode, opt.clip_root, opt.device, opt.amp)
    run.record(clip_sha256=encoder.sha256)
    if opt.path_t is None:
        torch.manual_seed(opt.seed)
        head = TeacNet(encoder.dim, opt.feature_dim, num_classes)
    else:
        head = load_head(opt.path_t, encoder, opt.feature_dim, num_classes)
        run.record(head_sha256=sha256_of(opt.path_t))
    embed = open_embeddings(dataset, encoder, opt.teacher_views, opt.save_dir, opt.device, opt.amp)
    return ClipTeacher(embed, head.to(opt.device))


@torch.no_grad()
def describe(
    student: Student | Classifier, teacher: ClipTeacher | CnnTeacher, dataset: ImageDataset, rows: Tensor | None
) -> Networks:
    """What the methods may ask about the two networks.

    Args:
        rows: the training rows that are used; None for all.
    """
    targets = dataset.train.targets
    if rows is not None:
        used = torch.zeros(len(targets), dtype=torch.bool)
        used[rows] = True
        targets = torch.where(used, targets, -1)
    weight = next(student.parameters())
    images = torch.zeros(2, *dataset.train.images.shape[1:], device=weight.device)
    out_s = student.eval()(images)
    shapes_s = [tuple(x.shape) for x in out_s.features]
    if isinstance(teacher, ClipTeacher):
        dim, width = out_s.embedding.shape[1], teacher.head.fit_dim_Net.in_features
        return Networks(shapes_s, [(2, width)], dim, dim, targets)
    features, _ = teacher.backbone(images, is_feat=True)
    shapes_t = [tuple(x.shape) for x in features]
    return Networks(shapes_s, shapes_t, shapes_s[-1][1], shapes_t[-1][1], targets, teacher.backbone)


def _read(path: str) -> dict:
    """The checkpoint that ``--path_t`` names."""
    if not Path(path).is_file():
        raise ValueError(f"--path_t {path}: no such file")
    state = checkpoint.load(Path(path))
    if not isinstance(state.get("model"), dict):
        raise ValueError(
            f"--path_t {path} holds no model: give the head of a CLIP that train_teacher.py wrote, or a CNN"
        )
    return state


def architecture(path: str) -> str | None:
    """Which CNN a checkpoint holds; None for the head of a CLIP.

    Our own files say so. RepDistiller's are in a folder that begins with the name: resnet32x4_vanilla.

    Raises:
        ValueError: the file is neither, or does not tell.
    """
    state = _read(path)
    if "clip_sha256" in state:
        return None
    folder = Path(path).absolute().parent.name
    named = [name for name in model_dict if folder == name or folder.startswith(f"{name}_")]
    arch = state.get("arch") or max(named, key=len, default=None)
    if arch not in model_dict:
        raise ValueError(
            f"--path_t {path}: which CNN it holds is told neither by the file nor by its folder's name, which has to "
            "begin with it, as RepDistiller's resnet32x4_vanilla does"
        )
    return arch


def _check_shapes(path: str, state: dict, model: nn.Module, check: str) -> None:
    """Raise a ValueError where a state dict's names and shapes are not the model's."""
    found = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if found != wanted:
        different = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"--path_t {path} has another shape: {different} is {found.get(different)}, "
            f"this run needs {wanted.get(different)} (check {check})"
        )


def load_cnn(path: str, num_classes: int) -> nn.Module:
    """A CNN with its classifier, from a checkpoint of ``train_teacher.py``'s or RepDistiller's.

    Raises:
        ValueError: not such a checkpoint, or of another number of classes.
    """
    model = create_model(architecture(path), num_classes)
    state = _read(path)["model"]
    _check_shapes(path, state, model, "--dataset; a student under the paper's protocol has no classifier of its own")
    model.load_state_dict(state)
    return model


def load_head(path: str, encoder: ImageEncoder, feature_dim: int, num_classes: int) -> TeacNet:
    """A head that ``train_teacher.py`` trained, frozen.

    Raises:
        ValueError: not a head's file, another shape, or trained on another CLIP.
    """
    state = _read(path)
    if "clip_sha256" not in state:
        raise ValueError(f"--path_t {path} is not the head of a CLIP teacher, as train_teacher.py writes it")
    head = TeacNet(encoder.dim, feature_dim, num_classes)
    _check_shapes(path, state["model"], head, "--feature_dim, --dataset and --clip_mode")
    if state["clip_sha256"] != encoder.sha256:
        raise ValueError(
            f"--path_t {path} was trained on another CLIP (SHA-256 {state['clip_sha256'][:12]}) than "
            f"--clip_mode {encoder.name} ({encoder.sha256[:12]}); train a head for this one"
        )
    head.load_state_dict(state["model"])
    return head.requires_grad_(False)
