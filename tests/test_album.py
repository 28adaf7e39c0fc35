from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palette._album import Album, Embedded
from palette.data.images import UnreadableImage


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A picture that no codec makes small."""
    path = tmp_path / "noise.png"
    pixels = np.random.RandomState(0).randint(0, 256, (150, 300, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def opened(found: Embedded) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(found.uri.partition(",")[2])))


def test_what_fits_stays_as_it_is(noise: Path) -> None:
    album = Album(1, side=300)
    found = album.embed(noise)
    with Image.open(noise) as original:
        assert np.array_equal(opened(found), original)
    assert album.remark().endswith("all of them pixel by pixel as in their files.")


@pytest.mark.parametrize("budget", [100_000, 40_000, 10_000, 2_000])
def test_a_share_is_kept(noise: Path, budget: int) -> None:
    album = Album(2, budget=budget, side=300)
    found = album.embed(noise)
    assert len(found.uri) <= budget // 2
    assert opened(found).format == "JPEG"
    assert opened(found).size == (found.width, found.height)
    assert "1 of 1 are shown" in album.remark()


def test_a_pair_is_treated_alike(noise: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("L", (300, 150), 9).save(plain)
    for budget in (2**20, 60_000):
        both = Album(2, budget=budget, side=300).pair(noise, plain)
        pictures = [opened(one) for one in both]
        assert {picture.format for picture in pictures} == {"PNG"}
        assert {picture.mode for picture in pictures} == {"RGB"}
        assert pictures[0].size == pictures[1].size
        assert sum(len(one.uri) for one in both) <= budget
    assert pictures[0].size < (300, 150)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x&y.png").write_bytes(b"")
    album = Album(3)
    assert "x&amp;y.png: not readable" in album.figure(tmp_path / "x&y.png", "caption")
    assert "gone.png: missing" in album.figure(tmp_path / "gone.png", "caption")
    with pytest.raises(UnreadableImage):
        album.embed(tmp_path / "gone.png")
