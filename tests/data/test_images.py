"""Every kind of picture comes out right, or is refused by name."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from palette.data import images
from palette.data.images import UnreadableImage


def _colours(height: int = 24, width: int = 40) -> npt.NDArray[np.uint8]:
    """A smooth picture with a different colour in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (255 * x / (width - 1), 255 * y / (height - 1), 255 - 255 * x / (width - 1))
    return np.stack(planes, axis=-1).astype(np.uint8)


def _picture(height: int = 24, width: int = 40) -> Image.Image:
    return Image.fromarray(_colours(height, width))


def _png(path: Path, width: int, height: int, body: bytes = b"\0" * 64) -> Path:
    """A PNG whose header promises a picture and whose data does not hold it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm", "tga", "webp", "gif", "jp2"])
def test_lossless_formats(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture.{extension}"
    picture = _picture()
    if extension == "gif":
        picture = picture.quantize(64)
    picture.save(path, **({"lossless": True} if extension == "webp" else {}))
    read = images.read(path)
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, extension: str) -> None:
    upright = _picture(32, 48)
    back = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for turn in back:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    stored.save(
        path, exif=exif, **({"quality": 95, "subsampling": 0} if extension == "jpg" else {})
    )
    read = images.read(path)
    assert read.size == upright.size
    assert np.abs(np.asarray(read, float) - np.asarray(upright, float)).max() < 16
    small = images.read(path, at_least=(8, 12))
    assert small.size == ((12, 8))


def test_damaged_exif_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    _picture().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert images.read(path).size == (40, 24)


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "print.tif"
    picture = _picture().convert("CMYK")
    picture.save(path)
    read = np.asarray(images.read(path), float)
    assert np.abs(read - _colours()).max() <= 1
    jpeg = tmp_path / "print.jpg"  # stored inverted, as Adobe's programs do
    picture.save(jpeg, quality=95, subsampling=0)
    assert np.abs(np.asarray(images.read(jpeg), float) - _colours()).max() < 16


def test_transparency_shows_white(tmp_path: Path) -> None:
    alpha = np.zeros((24, 40), dtype=np.uint8)
    alpha[:, 20:] = 255
    alpha[:, 10:20] = 128
    path = tmp_path / "rgba.png"
    Image.fromarray(np.dstack((_colours(), alpha))).save(path)
    read = np.asarray(images.read(path), float)
    assert (read[:, :10] == 255).all()
    assert np.array_equal(read[:, 20:], _colours()[:, 20:])
    blended = 255 + (_colours()[:, 10:20].astype(float) - 255) * 128 / 255
    assert np.abs(read[:, 10:20] - blended).max() <= 1
    black = np.asarray(images.read(path, background=(0, 0, 0)))
    assert (black[:, :10] == 0).all()


@pytest.mark.parametrize("kind", ["LA", "L", "1", "P", "P bytes", "RGB", "gif"])
def test_transparency_of_every_kind(tmp_path: Path, kind: str) -> None:
    black = Image.new("RGB", (6, 4), (0, 0, 0))
    path = tmp_path / ("clear.gif" if kind == "gif" else "clear.png")
    if kind == "LA":
        Image.new("LA", (6, 4), (0, 0)).save(path)
    elif kind in ("P", "gif"):
        black.quantize(4).save(path, transparency=0)
    elif kind == "P bytes":
        black.quantize(4).save(path, transparency=bytes([0] * 4))
    else:
        black.convert(kind).save(path, transparency=(0, 0, 0) if kind == "RGB" else 0)
    read = images.read(path)
    assert read.mode == ("L" if kind in ("LA", "L", "1") else "RGB")
    assert (np.asarray(read) == 255).all()


def test_grey_stays_grey(tmp_path: Path) -> None:
    for mode in ("L", "1"):
        path = tmp_path / f"{mode}.png"
        _picture().convert(mode).save(path)
        assert images.read(path).mode == "L"


@pytest.mark.parametrize("extension", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"deep.{extension}"
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    Image.fromarray(values).save(path)
    read = images.read(path)
    assert read.mode == "L"
    assert np.array_equal(np.asarray(read), np.rint(values / 257).astype(np.uint8))


def test_dark_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    path = tmp_path / "dark.png"
    Image.fromarray(np.full((4, 4), 514, np.uint16)).save(path)
    assert (np.asarray(images.read(path)) == 2).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0.0, 0.5, 1.0], np.float32), [0, 128, 255]),
        (np.array([0.0, 127.0, 255.0], np.float32), [0, 127, 255]),
        (np.array([0.0, 257.0, 65535.0], np.float32), [0, 1, 255]),
        (np.array([-1.0, 0.0, 1.0], np.float32), [0, 128, 255]),
        (np.array([7e5, 7e5, 7e5], np.float32), [0, 0, 0]),
        (np.array([0, 200, 255], np.int32), [0, 200, 255]),
        (np.array([0, 25700, 65535], np.int32), [0, 100, 255]),
        (np.array([-1000, 0, 1000], np.int32), [0, 128, 255]),
    ],
)
def test_float_and_long_pixels_are_scaled(
    tmp_path: Path, values: npt.NDArray[np.float32], expected: list[int]
) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(values.reshape(1, 3)).save(path)
    assert np.asarray(images.read(path)).tolist() == [expected]


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.tif"
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(path)
    with pytest.raises(UnreadableImage, match=r"nan\.tif: damaged image: .*not finite"):
        images.read(path)


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"moving.{extension}"
    first, second = Image.new("RGB", (8, 6), (255, 0, 0)), Image.new("RGB", (8, 6), (0, 255, 0))
    extra = {"lossless": True} if extension == "webp" else {}
    first.save(path, save_all=True, append_images=[second] * 50, **extra)
    read = images.read(path)
    assert read.size == (8, 6)
    assert (np.asarray(read) == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "YCbCr", "HSV", "I;16B", "F", "I"])
def test_pictures_in_memory_of_every_mode(mode: str) -> None:
    assert images.standard(Image.new(mode, (5, 4))).mode in ("L", "RGB")


@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (20_000, 20_000), (2**31 - 1, 1)])
def test_bombs_are_refused_by_their_header(tmp_path: Path, width: int, height: int) -> None:
    path = _png(tmp_path / "bomb.png", width, height)
    with pytest.raises(UnreadableImage, match=r"bomb\.png: .* above the limit of 134 megapixels"):
        images.read(path)


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    _png(tmp_path / "bomb.png", 20_000, 20_000, b"\0" * 10**8)
    code = (
        "import resource, sys\n"
        "from palette.data import images\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: images.read(sys.argv[1])\n"
        "except images.UnreadableImage: print(peak() - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "bomb.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(out.stdout) < 64 * 1024  # KiB


def test_the_limit_is_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    _picture().save(path)
    assert images.read(path, max_pixels=960).size == (40, 24)
    with pytest.raises(UnreadableImage, match="max_pixels"):
        images.read(path, max_pixels=959)


def test_the_limit_of_other_code_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    _picture().save(path)
    before = Image.MAX_IMAGE_PIXELS
    images.read(path)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("error")
def test_large_pictures_within_the_limit_do_not_warn(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 9_500)).save(path)
    assert images.read(path, at_least=(95, 100)).size == (100, 95)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tif", "jp2"])
def test_truncated_files(tmp_path: Path, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(extension, extension.upper())
    Image.fromarray(noise).save(whole, kind)
    path = tmp_path / f"half.{extension}"
    for length in (1, 20, len(whole.getvalue()) // 2):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(UnreadableImage, match=rf"half\.{extension}: ") as caught:
            images.read(path)
        assert "\n" not in str(caught.value)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Whatever the bytes are, the answer is a picture or UnreadableImage."""
    random = np.random.default_rng(1)
    path = tmp_path / "damaged"
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA"):
        whole = io.BytesIO()
        _picture().save(whole, kind)
        for _ in range(40):
            data = np.frombuffer(whole.getvalue(), np.uint8).copy()
            where = random.integers(0, len(data), 6)
            data[where] = random.integers(0, 256, 6)
            path.write_bytes(data.tobytes())
            refusal = str(path)
            try:
                assert images.read(path, max_pixels=10**6).mode in ("L", "RGB")
            except UnreadableImage as error:
                refusal = str(error)
            assert str(path) in refusal
            assert "\n" not in refusal


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    for name, reason in {
        "text.jpg": "not an image",
        "empty.jpg": "empty file",
        "folder.jpg": "a folder",
        "pipe.jpg": "not a regular file",
        "broken.jpg": "No such file",
        "circle.jpg": "symbolic links",
        "missing.jpg": "No such file",
    }.items():
        with pytest.raises(UnreadableImage, match=f"{name}: .*{reason}"):
            images.read(tmp_path / name)


def test_no_program_is_started_for_postscript(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
    with pytest.raises(UnreadableImage, match="not an image of a kind that can be read"):
        images.read(path)


@pytest.mark.parametrize(
    "name", ["with space.png", "new\nline.png", "größe 図.png", "'quote\".png"]
)
def test_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"nothing")
    with pytest.raises(UnreadableImage) as caught:
        images.read(path)
    assert str(caught.value).isprintable()
    _picture().save(path)
    assert images.read(path).size == (40, 24)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(path, "wb") as file:
        _picture().save(file, "PNG")
    assert images.read(os.fsdecode(path)).size == (40, 24)
    os.truncate(path, 30)
    with pytest.raises(UnreadableImage) as caught:
        images.read(os.fsdecode(path))
    str(caught.value).encode()


def test_reduced_decoding(tmp_path: Path) -> None:
    picture = _picture(480, 800)
    for name in ("a.jpg", "a.png"):
        picture.save(tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))
        small = images.read(tmp_path / name, at_least=(50, 50))
        assert 50 <= small.height < 100
        expected = picture.resize(small.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 2
        assert images.read(tmp_path / name, at_least=(481, 10)).size == (800, 480)


def test_every_value_survives_the_way_to_a_tensor_and_back() -> None:
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack((values, values[::-1], np.roll(values, 7)), -1).reshape(16, 16, 3)
    tensor = images.to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert np.array_equal(np.asarray(images.to_image(tensor)), pixels)
    grey = images.to_tensor(Image.fromarray(values.reshape(16, 16)), channels=1)
    assert grey.shape == (1, 16, 16)
    assert np.array_equal(np.asarray(images.to_image(grey)), values.reshape(16, 16))


def test_channels_are_converted() -> None:
    assert images.to_tensor(_picture(), channels=1).shape == (1, 24, 40)
    colour = images.to_tensor(_picture().convert("L"), channels=3)
    assert torch.equal(colour[0], colour[2])
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        images.to_tensor(_picture(), channels=4)


def test_tensors_out_of_range_are_clamped() -> None:
    tensor = torch.tensor([-9.0, 9.0, float("nan"), float("inf")]).reshape(1, 1, 4)
    assert np.asarray(images.to_image(tensor)).tolist() == [[0, 255, 0, 255]]
    with pytest.raises(ValueError, match=r"shape \[1 or 3, H, W\], got \[2, 3, 4, 4\]"):
        images.to_image(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("full", [(100, 300), (300, 100), (50, 50), (1, 5000)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("zoom", [1.0, 1.7])
def test_crops_keep_proportions_and_stay_inside(
    full: tuple[int, int], size: tuple[int, int], zoom: float
) -> None:
    for x in (0.0, 0.3, 1.0):
        left, top, right, bottom = images.crop_box(full, size, x=x, y=1 - x, zoom=zoom)
        assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1])
        assert left >= 0
        assert top >= 0
        assert right <= full[1]
        assert bottom <= full[0]
    image = Image.new("RGB", (full[1], full[0]), (9, 8, 7))
    resized = images.resize_crop(image, size, x=1.0, y=1.0, zoom=zoom)
    assert resized.size == (size[1], size[0])
    assert (np.asarray(resized) == (9, 8, 7)).all()


def test_the_largest_square_is_cropped() -> None:
    pixels = np.zeros((30, 90), np.uint8)
    pixels[:, 30:60] = 200
    image = Image.fromarray(pixels)
    assert (np.asarray(images.resize_crop(image, (30, 30))) == 200).all()
    assert (np.asarray(images.resize_crop(image, (30, 30), x=0.0)) == 0).all()


def test_resizing_is_antialiased() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    for resize in (images.resize_crop, images.squash):
        small = np.asarray(resize(Image.fromarray(board.astype(np.uint8)), (32, 32)), float)
        assert np.abs(small - 127.5).max() < 4


def test_squash_keeps_everything() -> None:
    squashed = np.asarray(images.squash(_picture(240, 400), (24, 24)), float)
    assert squashed.shape == (24, 24, 3)
    assert np.abs(squashed - np.asarray(_picture(24, 24), float)).max() < 8
