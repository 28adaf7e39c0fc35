"""Pictures and masks of every kind a user has: what their file would give, or one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from palette._pictures import extended, open_mask, open_picture
from palette.data import images
from palette.data.masks import load_mask

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
DEEP = GREY.astype(np.uint16) * 257
COLOUR = np.stack((GREY, GREY[::-1], 255 - GREY), axis=2)
CLEAR = np.dstack((COLOUR, GREY.T))
CLOSED = np.zeros((8, 8), dtype=np.uint8)
HOLE = CLOSED.copy()
HOLE[2:5, 3:7] = 1
PLAIN = Image.new("RGB", (8, 8))


def _pixels(picture: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(open_picture(picture))


@pytest.mark.parametrize("array", [GREY, DEEP, COLOUR, CLEAR], ids=lambda each: str(each.shape))
def test_pictures_are_what_their_file_is(tmp_path: Path, array: npt.NDArray[Any]) -> None:
    picture = Image.fromarray(array)
    picture.save(tmp_path / "picture.png")
    expected = _pixels(tmp_path / "picture.png")
    assert np.ptp(expected) > 200
    assert np.array_equal(_pixels(picture), expected)
    assert np.array_equal(_pixels(Image.open(tmp_path / "picture.png")), expected)
    assert np.array_equal(_pixels(array), expected)


def test_further_arrays() -> None:
    grey = np.dstack((GREY,) * 3)
    assert np.array_equal(_pixels(GREY[..., None]), grey)
    assert np.array_equal(_pixels(DEEP.astype(">u2")), grey)
    assert np.array_equal(_pixels(COLOUR.astype(np.uint16) * 257), COLOUR)
    assert np.array_equal(_pixels(COLOUR[:, ::-1]), COLOUR[:, ::-1])
    assert np.array_equal(_pixels(Image.fromarray(GREY / np.float32(255))), grey)


@pytest.mark.parametrize("orientation", [3, 6])
def test_pictures_from_cameras_are_upright(tmp_path: Path, orientation: int) -> None:
    """Once: what is made of them goes through here again."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR[:, :6]).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    expected = _pixels(tmp_path / "photo.jpg")
    upright = open_picture(Image.open(tmp_path / "photo.jpg"))
    assert np.array_equal(np.asarray(upright), expected)
    assert np.array_equal(_pixels(upright), expected)
    assert np.array_equal(_pixels(images.read(tmp_path / "photo.jpg")), expected)


@pytest.mark.parametrize(
    "array",
    [
        GREY.astype(np.float32) / 255,
        COLOUR.astype(np.float64),
        GREY.astype(np.int64),
        CLEAR[..., :2],
        GREY[0],
        COLOUR[None],
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays_that_say_too_little_are_refused(array: npt.NDArray[Any]) -> None:
    words = rf"image: found an array of {array.dtype} \[.*\], wants uint8 or uint16, \[H, W\] or"
    for take in (open_picture, lambda each: extended(each, (-2, 0, 8, 8))):
        with pytest.raises(ValueError, match=words) as caught:
            take(array)
        assert "\n" not in str(caught.value)


def test_pixels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="image: it has pixels that are not finite"):
        open_picture(Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)))


WHITE = np.dstack((HOLE * 255,) * 3)
MASKS = {
    "uint8": HOLE * 255,
    "uint8 of 0 and 1": HOLE,
    "bool": HOLE.astype(bool),
    "float": HOLE * 0.9,
    "float to 255": HOLE * 200.0,
    "uint16": HOLE.astype(np.uint16) * 40_000 + 20_000,
    "one channel": HOLE[..., None] * 255,
    "colour": WHITE,
    "bright colour": np.dstack((HOLE * 255, HOLE * 255, CLOSED)),
    "dark colour elsewhere": np.dstack((HOLE * 255, HOLE * 255, CLOSED + 255)),
    "white on nothing": np.dstack((WHITE, HOLE * 255)),
    "clear white elsewhere": np.dstack((WHITE * 0 + 255, HOLE * 255)),
    "tensor": torch.from_numpy(HOLE).float(),
    "tensor [1, H, W]": torch.from_numpy(HOLE).bfloat16()[None],
    "tensor [1, 1, H, W]": torch.from_numpy(HOLE)[None, None],
    "tensor [3, H, W]": images.to_tensor(Image.fromarray(WHITE)),
    "tensor above 1": torch.from_numpy(HOLE * 1.001),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_kind(tmp_path: Path, name: str) -> None:
    mask: Any = MASKS[name]
    assert open_mask(mask, PLAIN, 0).dtype == np.uint8
    assert np.array_equal(open_mask(mask, PLAIN, 0), HOLE)
    if isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.max() > 1:
        picture = Image.fromarray(mask[..., 0] if mask.shape[2:] == (1,) else mask)
        picture.save(tmp_path / "mask.png")
        assert np.array_equal(load_mask(tmp_path / "mask.png"), HOLE)
        assert np.array_equal(open_mask(picture, PLAIN, 0), HOLE)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((8, 8, 2)), r"mask: found float64 \[8, 8, 2\], wants numbers"),
        (np.zeros(8), r"mask: found float64 \[8\]"),
        (np.full((8, 8), "hole"), r"mask: found <U4 \[8, 8\]"),
        (torch.zeros(2, 8, 8), r"mask: found torch.float32 \[2, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8), r"mask: found torch.float32 \[2, 1, 8, 8\]"),
        (np.zeros((8, 9)), "mask: its size 9x8 is not the image's 8x8"),
    ],
)
def test_masks_that_fit_no_picture(mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_mask(mask, PLAIN, 0)
    assert "\n" not in str(caught.value)
