"""Search a folder of images with a finished student, by a text or by an image."""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

from dataset.decode import BadImage, read_rgb
from dataset.listing import shown
from errors import InputError
from helper import checkpoint
from helper.records import StoredRun, read_run

from .embed import count_pictures, embed_pictures, pictures_below, reader, student_embed
from .student import open_student
from .zero_shot import check_understands_text, load_text_encoder

# The contact sheet, in pixels.
_CELL, _MARGIN, _LINE, _FONT = 160, 12, 18, 13


def search(opt, device: str) -> Path:
    """Rank the images in a folder by their similarity to a text or an image.

    The similarity is the cosine between embeddings: the student's of an image, and its own of the other image or its
    CLIP teacher's of the text.

    Args:
        opt: ``runs`` with the one run, ``checkpoint``; ``search``, a text, or ``search_image``, a file; ``images``, the
            folder; ``top``, how many images the contact sheet shows; ``out``, its file, or None; ``force``.
        device: 'cpu' or 'cuda'.

    Returns:
        The contact sheet's path; all scores are in a CSV file beside it.

    Raises:
        InputError: no finished run, or a student that understands no text; no readable image; or files that would be
            overwritten.
        OSError: a file cannot be read or written.
    """
    run = read_run(opt.runs[0])
    query = opt.search if opt.search is not None else Path(opt.search_image).name
    picture, scores = _outputs(opt, run.folder, query)
    if opt.search is not None:
        check_understands_text(run)
    count = count_pictures(Path(opt.images), "--images")
    student = open_student(run, opt.checkpoint)
    embed = student_embed(student, device)
    if opt.search is not None:
        wanted = embed_text(run, query)
    else:
        wanted = _embed_example(Path(opt.search_image), reader(student), embed, device)
    paths = tqdm(pictures_below(Path(opt.images)), "searching", count, unit="image")
    found, similarities = [], []
    for batch, embeddings in embed_pictures(paths, reader(student), embed, device):
        found += batch
        similarities.append(F.normalize(embeddings, dim=1) @ wanted)
    if not found:
        raise InputError(f"--images {opt.images}: none of its images can be read")

    similarity = torch.cat(similarities)
    order = similarity.argsort(descending=True, stable=True).tolist()
    ranked = [(float(similarity[row]), found[row]) for row in order]
    example = None if opt.search_image is None else Path(opt.search_image)
    title = f'"{query}"' if example is None else f"images like {query}"
    picture.parent.mkdir(parents=True, exist_ok=True)
    _write_scores(ranked, scores)
    sheet = io.BytesIO()
    contact_sheet(ranked[: opt.top], f"{title} in {len(found)} images of {opt.images}", example).save(sheet, "PNG")
    checkpoint.write_bytes(sheet.getvalue(), picture)
    for rank, (score, path) in enumerate(ranked[: opt.top], start=1):
        print(f"{rank:3d}  {score:.4f}  {shown(str(path))}")
    return picture


def _outputs(opt, folder: Path, query: str) -> tuple[Path, Path]:
    """The files of the contact sheet and of the scores; an InputError where one may not be overwritten."""
    words = "-".join("".join(c if c.isalnum() else " " for c in query).split())[:60] or "query"
    picture = folder / f"search_{words}.png" if opt.out is None else Path(opt.out)
    if picture.suffix.lower() != ".png":
        raise InputError(f"--out {picture}: the contact sheet is a .png file")
    scores = picture.with_suffix(".csv")
    for path in (picture, scores):
        if path.exists() and not opt.force:
            raise InputError(f"{path} is there already: use --force to overwrite it, or another --out")
    return picture, scores


def _embed_example(
    path: Path, read: Callable[[Path], np.ndarray], embed: Callable[[Tensor], Tensor], device: str
) -> Tensor:
    """The embedding (D,) of unit norm of the image that is searched for."""
    try:
        pixels = torch.from_numpy(read(path)[None].copy()).permute(0, 3, 1, 2)
    except (BadImage, OSError) as error:
        raise InputError(f"--search_image {path} cannot be read as an image") from error
    with torch.no_grad():
        return F.normalize(embed(pixels.to(device))[0].float(), dim=0).cpu()


@torch.no_grad()
def embed_text(run: StoredRun, text: str) -> Tensor:
    """A text's embedding (D,) of unit norm, in the space of a run's CLIP and its student."""
    encoder = load_text_encoder(run)
    return F.normalize(encoder.encode_text(encoder.tokenize([text]))[0].float(), dim=0)


def _write_scores(ranked: list[tuple[float, Path]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "score", "file"])
    writer.writerows([rank, f"{score:.6f}", file] for rank, (score, file) in enumerate(ranked, start=1))
    checkpoint.write_bytes(text.getvalue().encode(errors="surrogateescape"), path)  # the names' own bytes


def contact_sheet(ranked: list[tuple[float, Path]], title: str, example: Path | None = None) -> Image.Image:
    """A picture of the best images, each with its rank, its score and its name.

    Args:
        ranked: score and file of each, the best first.
        example: the image that was searched for; it stands first.
    """
    font = ImageFont.load_default(_FONT)
    cells = [(example, "searched for", "")] if example is not None else []
    cells += [(path, f"{rank}   {score:.3f}", shown(path.name)) for rank, (score, path) in enumerate(ranked, start=1)]
    columns = min(max(math.ceil(math.sqrt(len(cells) * 1.3)), 3), 12)
    rows = math.ceil(len(cells) / columns)
    width, height = _CELL + _MARGIN, _CELL + 2 * _LINE + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _LINE + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _shortened(title, sheet.width - 2 * _MARGIN, font), "black", font)
    for place, (path, line, name) in enumerate(cells):
        left, top = _MARGIN + place % columns * width, _LINE + 2 * _MARGIN + place // columns * height
        image = read_rgb(path)
        # Small pictures keep their pixels.
        small = max(image.size) * 2 <= _CELL
        image = ImageOps.contain(image, (_CELL, _CELL), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
        draw.text((left, top + _CELL + 2), line, "black", font)
        draw.text((left, top + _CELL + 2 + _LINE), _shortened(name, _CELL, font), "#666666", font)
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
