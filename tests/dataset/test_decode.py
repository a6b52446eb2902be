import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision import transforms

from dataset.decode import EXTENSIONS, BadImage, read_square

RNG = np.random.default_rng(0)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def read(tmp_path, image: Image.Image, side: int, extension: str = ".png", **options) -> np.ndarray:
    path = tmp_path / f"picture{extension}"
    image.save(path, **options)
    return read_square(path, side)


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(64, 64, 64), (80, 64, 64), (64, 81, 64), (97, 33, 20), (33, 97, 20), (12, 17, 40), (400, 300, 73), (5, 200, 31)],
)
def test_pixels_are_those_of_torchvision_s_evaluation(tmp_path, width, height, side):
    image = noise(width, height)
    bicubic = transforms.Resize(side, transforms.InterpolationMode.BICUBIC)
    expected = np.asarray(transforms.CenterCrop(side)(bicubic(image)))
    found = read(tmp_path, image, side)
    assert found.shape == (side, side, 3) and found.dtype == np.uint8
    assert np.array_equal(found, expected)


def photograph(width: int, height: int) -> Image.Image:
    """Soft shapes of every size, as in a photograph."""
    rng = np.random.default_rng(0)
    picture = np.zeros((height, width, 3))
    for grid in (3, 9, 27):
        shapes = Image.fromarray(rng.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
        picture += np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), float) / grid
    return Image.fromarray((255 * picture / picture.max()).astype(np.uint8))


def test_a_jpeg_is_decoded_at_its_full_size_on_demand(tmp_path):
    path = tmp_path / "large.jpg"
    noise(640, 640).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(read_square(path, 40, exact=True), expected)
    assert not np.array_equal(read_square(path, 40), expected)


@pytest.mark.parametrize(("height", "scale"), [(159, 1), (160, 2), (319, 2), (320, 4), (640, 8), (2000, 8)])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_twice_the_size(tmp_path, monkeypatch, height, scale):
    path, sizes = tmp_path / "large.jpg", []
    photograph(height + 11, height).save(path)
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: sizes.append(self.size) or load(self))
    read_square(path, 40)
    assert sizes[-1] == (-(-(height + 11) // scale), -(-height // scale))
    assert min(sizes[-1]) >= (80 if scale > 1 else 40)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [(403, 333), (331, 457), (4 * 32, 4 * 32 + 1)])
def test_a_scaled_jpeg_shows_what_the_whole_one_does(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(*size).save(tmp_path / "large.jpg", quality=95, exif=exif)
    scaled, exact = (read_square(tmp_path / "large.jpg", 32, exact).astype(int) for exact in (False, True))
    apart = np.abs(scaled - exact)
    # A shift by a tenth of a pixel, or another side of the picture, would be more.
    assert 0 < apart.mean() < 0.5 and apart.max() <= 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_scaled_jpeg_of_another_mode_becomes_rgb(tmp_path, mode):
    photograph(400, 300).convert(mode).save(tmp_path / "large.jpg", quality=95)
    scaled, exact = (read_square(tmp_path / "large.jpg", 32, exact).astype(int) for exact in (False, True))
    assert scaled.shape == (32, 32, 3) and np.abs(scaled - exact).max() <= 4


def test_half_a_large_jpeg_is_refused(tmp_path):
    path = tmp_path / "half.jpg"
    photograph(640, 640).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImage, match="truncated"):
        read_square(path, 40)


def test_extensions_are_those_of_pictures():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"} <= EXTENSIONS
    assert not {".txt", ".xml", ".eps", ".ps", ".pdf", ".h5", ".mpg", ".npy", ".csv", ""} & EXTENSIONS


@pytest.mark.parametrize("extension", [".png", ".bmp", ".tiff", ".ppm", ".webp", ".gif"])
def test_formats_without_loss_give_the_pixels(tmp_path, extension):
    image = noise(16, 16)
    if extension == ".gif":
        image = image.quantize(200)
    options = {"lossless": True} if extension == ".webp" else {}
    assert np.array_equal(read(tmp_path, image, 16, extension, **options), np.asarray(image.convert("RGB")))


def test_the_content_and_not_the_extension_tells_the_format(tmp_path):
    image = noise(16, 16)
    image.save(tmp_path / "picture.jpg", format="png")
    assert np.array_equal(read_square(tmp_path / "picture.jpg", 16), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_is_the_same_in_every_channel(tmp_path, mode):
    image = noise(16, 16).convert(mode)
    found = read(tmp_path, image, 16)
    assert (found == np.asarray(image.convert("L"))[..., None]).all()


def test_what_is_transparent_shows_white(tmp_path):
    pixels = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[:4, :, 3], pixels[4:, :, 3] = 255, 0
    pixels[6, :, 3] = 51
    image = Image.fromarray(pixels)
    opaque = pixels[..., :3].astype(float)
    for picture, extension in ((image, ".png"), (image, ".webp")):
        found = read(
            tmp_path, picture, 8, extension, **({"lossless": True, "exact": True} if extension != ".png" else {})
        )
        assert np.array_equal(found[:4], pixels[:4, :, :3])
        assert (found[4:6] == 255).all()
        assert np.abs(found[6] - (0.2 * opaque[6] + 0.8 * 255)).max() <= 1
    grey = image.convert("LA")
    assert (read(tmp_path, grey, 8)[4:6] == 255).all()


def test_a_palette_s_transparent_colour_shows_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 8, 4))
    plain = read(tmp_path, image, 8)
    assert (plain[:4] == (10, 20, 30)).all() and (plain[4:] == (200, 100, 50)).all()
    found = read(tmp_path, image, 8, transparency=0)
    assert (found[:4] == 255).all() and (found[4:] == (200, 100, 50)).all()


@pytest.mark.parametrize(("extension", "tolerance"), [(".tiff", 0), (".jpg", 6)])
def test_cmyk_becomes_rgb(tmp_path, extension, tolerance):
    image = Image.new("CMYK", (16, 16), (0, 255, 128, 0))  # no red taken away, all green, half the blue
    found = read(tmp_path, image, 16, extension).astype(int)
    assert np.abs(found - (255, 0, 127)).max() <= tolerance


@pytest.mark.parametrize("kind", ["png", "little-endian tiff", "big-endian tiff", "pgm"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path, kind):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / f"grey.{kind.split()[-1]}"
    if kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    elif kind == "big-endian tiff":
        Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    found = read_square(path, 8)
    assert np.abs(found.astype(float) - values[..., None] / 257).max() <= 0.5


# What has to be done to the pixels of a file to see them upright, by EXIF's number (its standard's table 6).
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_s_orientation_is_honoured(tmp_path, orientation):
    image = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(tmp_path, image, 8, exif=exif), UPRIGHT[orientation](np.asarray(image)))


def test_a_corrupt_exif_block_is_no_damage_of_the_picture(tmp_path, recwarn):
    image = noise(16, 16)
    image.save(tmp_path / "plain.jpg")
    for block in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"):
        image.save(tmp_path / "corrupt.jpg", exif=block)
        assert np.array_equal(read_square(tmp_path / "corrupt.jpg", 16), read_square(tmp_path / "plain.jpg", 16))
    assert not recwarn.list


def png_of(width: int, height: int) -> bytes:
    """A file that says it has so many pixels, and holds none."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def bad_files(tmp_path) -> dict[str, bytes | Image.Image]:
    noise(64, 64).save(tmp_path / "whole.jpg")
    noise(64, 64).save(tmp_path / "whole.png")
    jpeg, png = (tmp_path / "whole.jpg").read_bytes(), (tmp_path / "whole.png").read_bytes()
    return {
        "truncated": jpeg[: len(jpeg) // 2],
        "truncated PNG": png[: len(png) // 2],
        "text": b"no picture\n",
        "empty": b"",
        "100 million pixels": png_of(10_000, 10_000),
        "4 billion pixels": png_of(65_535, 65_535),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }


@pytest.mark.parametrize(
    "kind", ["truncated", "truncated PNG", "text", "empty", "100 million pixels", "4 billion pixels", "EPS"]
)
def test_what_cannot_be_decoded_is_bad(tmp_path, kind):
    path = tmp_path / "bad.jpg"
    path.write_bytes(bad_files(tmp_path)[kind])
    with pytest.raises(BadImage) as raised:
        read_square(path, 16)
    assert str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [(np.ones((4, 4), np.float32), "floating-point"), (np.full((4, 4), 70_000, np.int32), "more than 16 bits")],
)
def test_numbers_of_no_known_range_are_bad(tmp_path, pixels, said):
    with pytest.raises(BadImage, match=said):
        read(tmp_path, Image.fromarray(pixels), 4, ".tiff")


def test_a_picture_that_would_be_immense_when_resized_is_bad(tmp_path):
    with pytest.raises(BadImage, match="50000 x 1 pixels"):
        read(tmp_path, Image.new("RGB", (50_000, 1)), 64)


def test_a_file_that_cannot_be_read_is_the_disk_s_error_and_not_the_picture_s(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_square(tmp_path / "missing.jpg", 16)
