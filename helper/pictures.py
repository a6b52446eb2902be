"""The views of a run's first batch, as a picture."""

import io

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dataset.loader import Loader, take

from .logger import VIEWS
from .teacher import CnnTeacher, EncoderTeacher

# The picture: so many images, in columns; a cell's height and width, and the caption's height, in pixels.
_IMAGES, _COLUMNS, _CELL, _LINE = 16, 8, 96, 14


def first_views(loader: Loader, teacher: EncoderTeacher | CnnTeacher | None) -> dict[str, bytes]:
    """A PNG of the first images of epoch 1, each as the student sees it and below as a frozen encoder does.

    A CNN teacher sees the student's view. No random numbers are drawn that training would draw. The picture is given by
    its file's name; only the first of many processes makes it, as the others may have no image.

    Args:
        loader: of the training.
        teacher: None where there is none.
    """
    if loader.rank:
        return {}
    draws = loader.draws(1)
    draw = next(draws)
    draws.close()
    stored = None if draw.stored is None else draw.stored[:_IMAGES]
    host = None if draw.host is None else draw.host[:, :_IMAGES]
    batch = loader.batch(draw._replace(numbers=draw.numbers[:, :_IMAGES], host=host, stored=stored))
    mean, std = (torch.tensor(x, device=batch.image.device)[:, None, None] for x in loader.normalization)
    rows = {"student": (batch.image * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)}
    if isinstance(teacher, EncoderTeacher):
        stored, encoder = take(loader.images, batch.index, loader.device), teacher.encoder
        fed = (encoder.resolution, encoder.interpolation, encoder.antialias)
        rows["teacher"] = loader.views.teacher(stored, batch.index, batch.teacher_view, *fed)
    return {VIEWS: _sheet({name: images.cpu() for name, images in rows.items()})}


def _sheet(rows: dict[str, Tensor]) -> bytes:
    """A PNG: images (N, 3, H, W) uint8 in rows of ``_COLUMNS``; a row of each name, then the next images."""
    count = len(next(iter(rows.values())))
    height, blocks = _LINE + _CELL, -(-count // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, blocks * len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (name, images) in enumerate(rows.items()):
        for number, image in enumerate(images):
            block, column = divmod(number, _COLUMNS)
            top = (block * len(rows) + place) * height
            if column == 0:
                pen.text((2, top), f"{name}, {images.shape[-1]} pixels", "black")
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            # Small pictures keep their pixels.
            filter = Image.Resampling.NEAREST if picture.width < _CELL else Image.Resampling.BILINEAR
            sheet.paste(picture.resize((_CELL - 2, _CELL - 2), filter), (column * _CELL + 1, top + _LINE))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()
