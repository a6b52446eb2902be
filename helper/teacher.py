"""The teacher: a frozen CLIP's embeddings and the head on them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import ImageDataset
from dataset.loader import Batch
from models.clip_teacher import ImageEncoder, sha256_of
from models.heads import Outputs, TeacNet

from . import checkpoint
from .bank import OnTheFly, open_bank
from .run import Run
from .runtime import DTYPES, teacher_precision


class ClipTeacher(nn.Module):
    """Turns a batch into the teacher's outputs.

    Args:
        embed: (split, index, view) to embeddings; a bank, or a fresh encoding.
        head: the projection and the classifier; frozen when its parameters need no gradient.
    """

    def __init__(self, embed: Callable[[str, Tensor, Tensor], Tensor], head: TeacNet):
        super().__init__()
        self.embed = embed
        self.head = head

    def forward(self, split: str, batch: Batch) -> Outputs:
        x = self.embed(split, batch.index, batch.teacher_view)
        embedding, logits = self.head(x)
        return Outputs(embedding, logits, [x])


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


def build_teacher(opt, dataset: ImageDataset, run: Run) -> ClipTeacher:
    """The teacher that the options describe: frozen CLIP and head, its bank built where it is missing.

    Notes in the run what the teacher's weights are. Raises what loading them and opening the bank raise.
    """
    encoder = load_encoder(opt.clip_mode, opt.clip_root, opt.device, opt.amp)
    run.record(clip_sha256=encoder.sha256)
    num_classes = len(dataset.classes)
    if opt.path_t is None:
        torch.manual_seed(opt.seed)
        head = TeacNet(encoder.dim, opt.feature_dim, num_classes)
    else:
        head = load_head(opt.path_t, encoder, opt.feature_dim, num_classes)
        run.record(head_sha256=sha256_of(opt.path_t))
    embed = open_embeddings(dataset, encoder, opt.teacher_views, opt.save_dir, opt.device, opt.amp)
    return ClipTeacher(embed, head.to(opt.device))


def load_head(path: str, encoder: ImageEncoder, feature_dim: int, num_classes: int) -> TeacNet:
    """A head that ``train_teacher.py`` trained, frozen.

    Raises:
        ValueError: not a head's file, another shape, or trained on another CLIP.
    """
    if not Path(path).is_file():
        raise ValueError(f"--path_t {path}: no such file")
    state = checkpoint.load(Path(path))
    if not {"model", "clip_sha256"} <= state.keys():
        raise ValueError(f"--path_t {path} is not the head of a CLIP teacher, as train_teacher.py writes it")
    head = TeacNet(encoder.dim, feature_dim, num_classes)
    found = {name: tuple(value.shape) for name, value in state["model"].items()}
    wanted = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    if found != wanted:
        different = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"--path_t {path} has another shape: {different} is {found.get(different)}, "
            f"this run needs {wanted.get(different)} (check --feature_dim, --dataset and --clip_mode)"
        )
    if state["clip_sha256"] != encoder.sha256:
        raise ValueError(
            f"--path_t {path} was trained on another CLIP (SHA-256 {state['clip_sha256'][:12]}) than "
            f"--clip_mode {encoder.name} ({encoder.sha256[:12]}); train a head for this one"
        )
    head.load_state_dict(state["model"])
    return head.requires_grad_(False)
