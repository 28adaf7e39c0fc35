"""The part of a large picture that the network sees, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from palette.data import region


def _mask(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    ("shape", "hole"),
    [
        ((3000, 4000), (1900, 1400, 2300, 1700)),  # inside a 12-megapixel photograph
        ((3000, 4000), (0, 0, 50, 40)),  # in a corner
        ((100, 900), (10, 10, 800, 90)),  # wider than the picture is high
        ((40, 50), (5, 5, 20, 20)),  # smaller than the network's size
        ((64, 64), (0, 0, 64, 64)),  # all of it
    ],
)
def test_region_holds_the_hole_and_fits_the_picture(shape, hole):
    mask = _mask(*shape, hole)
    found = region.around_hole(mask, (64, 64))
    left, top, right, bottom = found.box
    assert 0 <= left <= hole[0] < hole[2] <= right <= shape[1]
    assert 0 <= top <= hole[1] < hole[3] <= bottom <= shape[0]
    assert found.height <= 64
    assert found.width <= 64
    aspect = (right - left) / (bottom - top)
    assert found.width / found.height == pytest.approx(aspect, rel=0.1)


def test_region_has_context_on_every_side_where_there_is_room():
    found = region.around_hole(_mask(1000, 1000, (400, 450, 600, 550)), (64, 64))
    assert found.box == (300, 300, 700, 700)  # twice the longer side, centred


def test_small_hole_is_seen_at_its_own_scale():
    found = region.around_hole(_mask(1000, 1000, (500, 500, 510, 510)), (64, 64))
    assert found.shape == (64, 64)
    assert not found.shrinks


def test_a_mask_without_a_hole_is_refused():
    with pytest.raises(ValueError, match="no hole"):
        region.around_hole(np.zeros((8, 8), dtype=np.uint8), (4, 4))


def test_nothing_of_the_hole_leaks_into_known_pixels_when_shrinking():
    mask = _mask(301, 299, (101, 97, 203, 198))
    dark = Image.fromarray(np.where(mask[..., None], 0, 128).repeat(3, 2).astype(np.uint8))
    light = Image.fromarray(np.where(mask[..., None], 255, 128).repeat(3, 2).astype(np.uint8))
    found = region.around_hole(mask, (32, 32))
    small_dark, small_hole = region.shrink(dark, mask, found)
    small_light, _ = region.shrink(light, mask, found)
    known = small_hole == 0
    assert known.any()
    assert (np.asarray(small_dark)[known] == 128).all()
    assert (np.asarray(small_light)[known] == 128).all()


def test_paste_touches_the_hole_only():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    mask = (rng.random((120, 160)) < 0.1).astype(np.uint8)
    found = region.around_hole(mask, (32, 32))
    filled = Image.new("RGB", (found.width, found.height), (1, 2, 3))
    result = np.asarray(region.paste(Image.fromarray(pixels), mask, found, filled))
    assert (result[mask == 0] == pixels[mask == 0]).all()
    assert (result[mask == 1] == (1, 2, 3)).all()
