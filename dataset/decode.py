"""An image file as a square of RGB pixels."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# Pillow needs another program for these formats, or has no decoder for them.
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

Image.init()
_FORMATS = ["JPEG", "PNG", *sorted(Image.OPEN.keys() - {"JPEG", "PNG", *_NO_PICTURES})]
EXTENSIONS = frozenset(extension for extension, name in Image.registered_extensions().items() if name in _FORMATS)

# The way a picture is resized, in the key of the file of results; another way needs another name.
RESAMPLING = "short side, Pillow's bicubic, centre"
SCALED = f"{RESAMPLING}; large JPEGs decoded at a half, a quarter or an eighth"

# A JPEG is decoded at a smaller scale if at least so many times the wanted size is left for the resampling.
_LEFT = 2

_ORIENTATION = 0x0112  # EXIF's tag


class BadImage(ValueError):
    """A file that cannot be decoded; the message says why."""


def read_square(path: str | os.PathLike, side: int, exact: bool = False) -> np.ndarray:
    """The centre of a picture, its short side resized to ``side`` pixels.

    The pixels are those of torchvision's ``Resize(side)`` with bicubic interpolation and ``CenterCrop(side)`` on the
    PIL image, as in the usual evaluation on ImageNet. A wide picture loses its sides, a high one its top and bottom.

    A JPEG with a short side of four times ``side`` or more is decoded at a half, a quarter or an eighth, which libjpeg
    does in a fraction of the time. At least twice ``side`` is left, and then resized. Pixels differ by a few levels;
    docs/performance.md has the numbers.

    Args:
        exact: decode every JPEG at its full size.

    Returns:
        (side, side, 3) uint8.

    Raises:
        BadImage, OSError: see ``read_rgb``.
    """

    def use(image: Image.Image) -> np.ndarray:
        scaled = None
        if not exact and isinstance(image, JpegImageFile) and min(image.size) >= 2 * _LEFT * side:
            size = _resized(*image.size, side)
            scaled = image.draft(None, (_LEFT * side, _LEFT * side))
        if scaled is None:
            return np.asarray(square(upright_rgb(image), side))
        # A scaled picture may end with a part of a pixel: the box says where.
        resized = _to_rgb(image).resize(size, Image.Resampling.BICUBIC, box=scaled[1])
        return np.asarray(_centre(_upright(resized), side))

    return _read(path, use)


def read_rgb(path: str | os.PathLike, use: Callable[[Image.Image], Any] = Image.Image.copy) -> Any:
    """Read the first picture of a file, see ``upright_rgb``, and return what ``use`` makes of it.

    Args:
        use: makes something of the picture, while its file is open.

    Raises:
        BadImage: the file is no image, is damaged, has more pixels than Pillow thinks safe, or has no single way to
            8 bits.
        OSError: the file cannot be read at all.
    """
    return _read(path, lambda image: use(upright_rgb(image)))


def _read(path: str | os.PathLike, use: Callable[[Image.Image], Any]) -> Any:
    """Do as ``read_rgb``, with the picture as it lies in its file, not decoded yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF blocks, say
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
                return use(image)
    except UnidentifiedImageError:
        raise BadImage("not an image, or damaged at its beginning") from None
    except Exception as error:  # a damaged file makes Pillow raise whatever it stumbles over
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the picture's
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture in 8-bit RGB: upright by EXIF's orientation, white where it is transparent, 16 bits scaled to 8.

    Raises:
        BadImage: the picture has no single way to 8 bits.
    """
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # a corrupt EXIF block says nothing about the pixels
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("pixels are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to 8 bits
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImage("pixels have more than 16 bits")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> Image.Image:
    """The centre of a picture, its short side resized to ``side`` pixels.

    Raises:
        BadImage: the picture is too long.
    """
    return _centre(image.resize(_resized(*image.size, side), Image.Resampling.BICUBIC), side)


def _resized(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height of a picture after its short side was resized to ``side``."""
    short, long = sorted((width, height))
    resized = int(side * long / short)
    if side * resized > Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"{width} x {height} pixels, too long for their other side")
    return (resized, side) if width > height else (side, resized)


def _centre(image: Image.Image, side: int) -> Image.Image:
    cut = round((max(image.size) - side) / 2)
    landscape = image.width > image.height
    return image.crop((cut, 0, cut + side, side) if landscape else (0, cut, side, cut + side))
