"""The embedded default: coloured, textured shapes, drawn on demand; no files, no network.

A class is one of ten shapes filled with one of ten textures. Position, size, rotation, colours,
background, clutter and noise say nothing about it. Few images are labelled and many are captioned:
a CLIP is worth distilling in this case, as captions are cheap and labels are not.
"""

from collections.abc import Callable

import numpy as np
import torch

from .images import ImageDataset, Split

SIZE = 32
TRAIN_PER_CLASS, TEST_PER_CLASS, CAPTIONED_PER_CLASS = 5, 30, 500
_SEEDS = {"train": 1, "test": 2, "captioned": 3}

# Numbers below are pixels. In shapes they are not: a shape's frame puts its outline at about 1 from the centre.
_RADIUS = (9.0, 13.0)
_SHIFT = 3.0
_PERIOD = (5.0, 6.5)
_TINT = 0.15
_TILT = 0.4  # radians
_CLUTTER = 2
_NOISE = (0.0, 0.06)

_Field = Callable[..., np.ndarray]


def _rectangle(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.55


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Reflected into one of its ten right-angled sectors, a five-pointed star is a single line.
    x = np.abs(x)
    for normal_x, normal_y in ((0.809, -0.588), (-0.809, -0.588)):
        beyond = 2 * np.maximum(normal_x * x + normal_y * y, 0)
        x, y = x - beyond * normal_x, y - beyond * normal_y
    return 0.951 * np.abs(x) * 0.85 + 0.53 * (y - 1.1)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    lobe = np.hypot(x - 0.42, y - 0.35) - 0.52
    tip = np.maximum(0.74 * x - 0.67 * y - 0.58, y - 0.35)
    return np.minimum(lobe, tip)


# Signed distance (negative inside, exact enough near the outline) from (x, y) in the shape's frame.
_SHAPES: dict[str, _Field] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.85,
    "square": lambda x, y: _rectangle(x, y, 0.75, 0.75),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.minimum(_rectangle(x, y, 0.95, 0.33), _rectangle(x, y, 0.33, 0.95)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.65) - 0.3,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.7 - np.hypot(x - 0.55, y)),
    "heart": _heart,
    "bar": lambda x, y: _rectangle(x, y, 1.0, 0.42),
    "hourglass": lambda x, y: np.maximum(np.abs(y) - 0.9, 0.75 * (np.abs(x) - np.abs(y)) - 0.1),
}


def _wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between -1 and 1."""
    return 4 * np.abs(x - np.floor(x + 0.5)) - 1


def _step(x: np.ndarray, sharpness: float = 2.5) -> np.ndarray:
    """A step from 0 to 1 where x changes sign, over about a pixel."""
    return np.clip(0.5 + sharpness * x, 0, 1)


# Each gives the share of the second colour, 0 to 1, at texture coordinates (u, v) in periods;
# ``r`` is the distance from the shape's centre in periods, ``d`` the pixels to its outline, negative inside.
_TEXTURES: dict[str, _Field] = {
    "plain": lambda u, v, r, d: np.zeros_like(u),
    "striped": lambda u, v, r, d: _step(_wave(u)),
    "checkered": lambda u, v, r, d: _step(_wave(u * 0.7) * _wave(v * 0.7), 4),
    "dotted": lambda u, v, r, d: _step(np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5) - 0.3, -5),
    "gridded": lambda u, v, r, d: _step(np.maximum(_wave(u * 0.9), _wave(v * 0.9)) - 0.4),
    "wavy": lambda u, v, r, d: _step(_wave(u + 0.45 * _wave(v * 0.6))),
    "ringed": lambda u, v, r, d: _step(_wave(r)),
    "shaded": lambda u, v, r, d: np.clip(0.5 + 0.3 * u, 0, 1),
    "outlined": lambda u, v, r, d: np.clip(d + 2.2, 0, 1),
    "halved": lambda u, v, r, d: _step(u),
}

# Textures that sit on the shape's centre; the others are shifted at random.
_CENTRED = ("shaded", "halved")

CLASSES = [f"{texture} {shape}" for shape in _SHAPES for texture in _TEXTURES]


def _rotate(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _draw_class(name: str, count: int, seed: tuple[int, int]) -> np.ndarray:
    """``count`` images of one class, (count, 3, SIZE, SIZE) uint8."""
    texture, shape = name.split(" ")
    rng = np.random.default_rng(seed)

    def uniform(low: float, high: float, *size: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(size or (1, 1)))).astype(np.float32)

    grid = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    px, py = grid[None, None, :], grid[None, :, None]

    # Levels are dark, middling and bright in each channel, with a random tint: both colours differ from the background.
    levels = np.array([0.15, 0.5, 0.85], dtype=np.float32)[:, None]
    levels = levels + rng.uniform(-_TINT, _TINT, (count, 3, 3)).astype(np.float32)
    background, second, first = levels.transpose(1, 0, 2)[..., None, None]

    # A background that fades, and bars of any colour across it.
    fade, _ = _rotate(px, py, uniform(0, 2 * np.pi))
    image = background + (fade / SIZE)[:, None] * uniform(-0.3, 0.3, 3, 1, 1)

    def clutter(image: np.ndarray, reach: float) -> np.ndarray:
        x, y = _rotate(px - uniform(-reach, reach), py - uniform(-reach, reach), uniform(0, 2 * np.pi))
        cover = _step(-_rectangle(x, y, uniform(1, 8), uniform(0.5, 2)), 1)[:, None]
        return image + cover * (uniform(0, 1, 3, 1, 1) - image)

    for _ in range(_CLUTTER):
        image = clutter(image, 16)

    radius = uniform(*_RADIUS)
    x, y = px - uniform(-_SHIFT, _SHIFT), py - uniform(-_SHIFT, _SHIFT)
    distance = _SHAPES[shape](*_rotate(x / radius, y / radius, uniform(-_TILT, _TILT))) * radius
    period = uniform(*_PERIOD)
    u, v = _rotate(x / period, y / period, uniform(-_TILT, _TILT))
    if texture not in _CENTRED:
        u, v = u + uniform(0, 1), v + uniform(0, 1)
    amount = _TEXTURES[texture](u, v, np.hypot(x, y) / period, distance)[:, None]
    image = image + _step(-distance, 1)[:, None] * (first + amount * (second - first) - image)
    image = clutter(image, 13)

    image += uniform(*_NOISE, 1, 1, 1) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def draw(split: str, per_class: int) -> Split:
    """Images of a split, the same on every call; row i is of class i % 100.

    Args:
        split: 'train', 'test' or 'captioned'.
        per_class: number of images of each class.
    """
    images = np.empty((per_class, len(CLASSES), 3, SIZE, SIZE), dtype=np.uint8)
    for target, name in enumerate(CLASSES):
        images[:, target] = _draw_class(name, per_class, (_SEEDS[split], target))
    targets = torch.arange(len(CLASSES)).repeat(per_class)
    return Split(torch.from_numpy(images.reshape(-1, 3, SIZE, SIZE)), targets)


def load_shapes(data_dir: str) -> ImageDataset:
    """Few labelled, some test and many captioned images of 32 x 32 pixels in 100 classes; needs no ``data_dir``."""
    return ImageDataset(
        "shapes",
        CLASSES,
        draw("train", TRAIN_PER_CLASS),
        draw("test", TEST_PER_CLASS),
        draw_captioned=lambda: draw("captioned", CAPTIONED_PER_CLASS),
    )
