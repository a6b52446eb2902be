"""The baseline: EGA as the paper's release trains it, written anew.

Worker processes make PIL views, and the frozen teacher encodes every batch. A step has a 2B x 2B correlation matrix and
two backward passes, and reads its metrics back. All is in float32, but the teacher is in fp16 on CUDA.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dataset import Split
from dataset.views import CLIP_NORMALIZATION, CropViews
from helper.util import AverageMeter, accuracy
from models.heads import Student


def corrcoef(x: Tensor) -> Tensor:
    """Pearson correlations (N, N) of the rows of (N, D)."""
    centred = x - x.mean(dim=1, keepdim=True)
    covariance = centred @ centred.T / (x.shape[1] - 1)
    std = torch.diag(covariance).sqrt()
    return covariance / std[:, None] / std[None, :]


def direct_ega(f_s: Tensor, f_t: Tensor, node_weight: float = 0.8, edge_weight: float = 0.24) -> Tensor:
    """EGA by the direct formula: all correlations of all 2B embeddings, then the blocks that are needed.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's embeddings, (B, D).
    """
    batch = len(f_s)
    correlation = corrcoef(torch.cat([f_t, f_s]))
    identity = torch.eye(batch, device=f_s.device, dtype=f_s.dtype)
    node = torch.linalg.matrix_norm(correlation[:batch, batch:] - identity)
    edge = torch.linalg.matrix_norm(correlation[:batch, :batch] - correlation[batch:, batch:])
    return node_weight * node + edge_weight * edge


class TwoViews(Dataset):
    """Makes one image at a time with PIL: the student's view, the teacher's, drawn independently, and the class."""

    def __init__(self, split: Split, resolution: int):
        self.data = np.ascontiguousarray(split.images.permute(0, 2, 3, 1).numpy())
        self.targets = split.targets.tolist()
        to_tensor = [transforms.ToTensor(), transforms.Normalize(*CLIP_NORMALIZATION)]
        size = self.data.shape[1]
        crop = transforms.RandomCrop(size, padding=CropViews(size).padding)
        flip = transforms.RandomHorizontalFlip()
        resize = transforms.Resize((resolution, resolution), InterpolationMode.BICUBIC)
        self.student_view = transforms.Compose([crop, flip, *to_tensor])
        self.teacher_view = transforms.Compose([crop, resize, flip, *to_tensor])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = Image.fromarray(self.data[index])
        return self.student_view(image), self.teacher_view(image), self.targets[index]


def release_loader(split: Split, resolution: int, batch_size: int, workers: int) -> DataLoader:
    """Shuffled batches (student's view, teacher's view, class) from worker processes."""
    return DataLoader(TwoViews(split, resolution), batch_size, shuffle=True, num_workers=workers)


def release_steps(
    loader: DataLoader,
    encoder: nn.Module,
    student: Student,
    head: nn.Module,
    optimizer_s: torch.optim.Optimizer,
    optimizer_t: torch.optim.Optimizer,
    device: torch.device,
) -> Iterator[None]:
    """Training steps, one for each ``next``.

    Args:
        encoder: the frozen teacher.
        head: the teacher's head, trained with the student.
    """
    meters = {name: AverageMeter() for name in ("loss", "loss_teacher", "top1", "top5", "top1_teacher")}
    student.train()
    for image, image_t, target in loader:
        image, image_t, target = image.to(device), image_t.to(device), target.to(device)
        with torch.no_grad():
            x_t = encoder(image_t)
        f_t, logit_t = head(x_t)
        out = student(image)
        loss = F.cross_entropy(out.logits, target) + direct_ega(out.embedding, f_t.detach())
        loss_t = F.cross_entropy(logit_t, target)

        top1, top5 = accuracy(out.logits, target, topk=(1, 5))
        (top1_t,) = accuracy(logit_t, target)
        for meter, value in zip(meters.values(), (loss, loss_t, top1, top5, top1_t), strict=True):
            meter.update(value.item(), len(target))

        optimizer_t.zero_grad()
        loss_t.backward(retain_graph=True)
        optimizer_t.step()
        optimizer_s.zero_grad()
        loss.backward(retain_graph=True)
        optimizer_s.step()
        yield
