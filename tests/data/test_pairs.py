"""Pictures and the conditions that belong to them, from the source to the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palette import config as configs
from palette.build import build_datasets
from palette.config import ConfigError
from palette.data.dataset import TaskDataset
from palette.data.order import Draws
from palette.data.sources import Folder, Pairs
from palette.data.tasks import make_task

SIZE = (8, 12)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """color/ and gray/ of published Palette, gray the negative so that it is told apart."""
    for index in range(6):
        numbers = np.random.default_rng(index)
        grey = np.repeat(numbers.integers(0, 256, (24, 36, 1), dtype=np.uint8), 3, axis=2)
        for name, pixels in (("color", grey), ("gray", 255 - grey[..., 0])):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{index:05d}.png")
    return tmp_path


@pytest.mark.parametrize("fit", ["squash", "largest", "zoom", "center"])
def test_both_are_cropped_and_mirrored_alike(published: Path, fit: str) -> None:
    task = make_task("colorize")
    dataset = TaskDataset(Pairs(published), task, SIZE, 3, fit=fit, flip=True)  # type: ignore[arg-type]
    for entry in dataset.__getitems__([(0, index) for index in range(6)]):
        assert entry["condition"].shape == (3, *SIZE)
        assert torch.allclose(entry["condition"], -entry["target"], atol=0.02)


def test_published_names_and_lists(published: Path) -> None:
    (published / "some.flist").write_text("4\n00001\n2.png\n")
    (published / "color" / "2.png").write_bytes((published / "color" / "00002.png").read_bytes())
    (published / "gray" / "2.png").write_bytes((published / "gray" / "00002.png").read_bytes())
    source = Pairs(published, names=published / "some.flist")
    assert [source.name(index) for index in range(len(source))] == [
        "00004.png",
        "00001.png",
        "2.png",
    ]
    pair = source.load(0, Draws(0))
    with Image.open(published / "gray" / "00004.png") as wanted:
        assert pair.condition.tobytes() == wanted.tobytes()


def test_two_folders_of_equal_names(published: Path) -> None:
    source = Pairs(published / "color", conditions=published / "gray")
    assert len(source) == 6
    small = Image.open(published / "gray" / "00000.png").resize((18, 12))
    small.save(published / "gray" / "00000.png")
    assert source.load(0, Draws(0)).condition.size == (36, 24)
    for index in range(6):
        (published / "gray" / f"{index:05d}.png").unlink()
    with pytest.raises(ValueError, match=r"gray: no 00000.png in it; pairs need both"):
        Pairs(published / "color", conditions=published / "gray")
    with pytest.raises(ValueError, match="color: no such folder"):
        Pairs(published / "color")


def test_a_config_names_them(published: Path) -> None:
    text = f"data: {{source: pairs, path: {published}, image_size: 8, validation: 0}}\n"
    config = configs.from_yaml(text, overrides=["task.name=paired"])
    entry = build_datasets(config)[0][0, 0]
    assert torch.allclose(entry["condition"], -entry["target"], atol=0.02)
    with pytest.raises(ConfigError, match=r"task.name=inpaint takes no condition"):
        build_datasets(configs.from_yaml(text))
    with pytest.raises(ConfigError, match=r"data.names goes with data.source=pairs alone"):
        configs.from_yaml("data: {names: a.txt}")
    alone = TaskDataset(Folder(published / "color"), make_task("paired"), 8, 0)
    with pytest.raises(ValueError, match="must give pairs for the task 'paired'"):
        alone[0, 0]
