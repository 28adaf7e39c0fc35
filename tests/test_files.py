"""Files in, files out: what is read is never written over, and every result has its own name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palette import config as configs
from palette.build import build_network
from palette.files import Wishes, sample_files, unique
from palette.pipeline import Pipeline


@pytest.fixture(scope="module")
def model() -> Pipeline:
    """An untrained network of the smallest size."""
    config = configs.from_yaml(
        "model: {channels: 32, channel_mults: [1], res_blocks: 1, attention_resolutions: []}\n"
        "task: {name: inpaint, mask: center}\ndata: {image_size: 8}\nsample: {steps: 1}\n"
    )
    return Pipeline(build_network(config), config, device="cpu", precision="float32")


def _draw(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    hole = np.zeros((8, 8), dtype=np.uint8)
    hole[2:6, 2:6] = 255
    Image.fromarray(hole).save(path)
    return path


@pytest.mark.parametrize("given", ["file", "folder", "link", "hole", "holes"])
def test_what_is_read_is_not_written_over(model: Pipeline, tmp_path: Path, given: str) -> None:
    photo, hole = _draw(tmp_path / "in" / "photo.png"), _draw(tmp_path / "holes" / "photo.png")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "photo.png").symlink_to(photo)
    inputs, mask, output = {
        "file": (photo, hole, photo.parent),
        "folder": (photo.parent, hole, photo.parent),
        "link": (photo, hole, tmp_path / "link"),
        "hole": (photo, hole, hole.parent),
        "holes": (photo, hole.parent, hole.parent),
    }[given]
    before = photo.read_bytes(), hole.read_bytes()
    with pytest.raises(ValueError, match=r"--output: .*photo\.png would overwrite an input"):
        list(sample_files([model], [inputs], output, Wishes(mask=str(mask))))
    assert (photo.read_bytes(), hole.read_bytes()) == before
    assert (tmp_path / "link" / "photo.png").is_symlink()


def test_another_name_beside_the_input_is_free(model: Pipeline, tmp_path: Path) -> None:
    photo = _draw(tmp_path / "photo.png")
    for _ in range(2):  # results of an earlier time may be replaced
        written = list(sample_files([model], [photo], tmp_path, Wishes(mask="center"), count=2))
    assert [path.name for path in written] == ["photo_0.png", "photo_1.png"]


def test_names_are_counted_up_until_they_are_free() -> None:
    assert unique(["a", "b", "a", "a"]) == ["a", "b", "a~2", "a~3"]
    assert unique(["a", "a", "a~2"]) == ["a", "a~3", "a~2"]
    assert unique(["a~2", "a", "a", "a~2"]) == ["a~2", "a", "a~3", "a~2~2"]
