"""Pictures from tar archives: which, in what order, with which classes, and what is refused."""

from __future__ import annotations

import io
import logging
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palette.build import build_datasets
from palette.config import ConfigError, from_sections
from palette.data.dataset import Batches, TaskDataset
from palette.data.images import UnreadableImage
from palette.data.loader import Loader
from palette.data.order import Draws
from palette.data.shards import Shards, find_shards
from palette.data.sources import Labelled, open_source
from palette.data.tasks import colorize


def _picture(shade: int, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, kind)
    return file.getvalue()


def _pack(path: Path, entries: dict[str, bytes]) -> Path:
    """An archive of files by name."""
    with tarfile.open(path, "w") as archive:
        for name, data in entries.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    return path


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Three archives of four pictures, each of one grey: its number; class = number % 3."""
    for shard in range(3):
        entries = {}
        for number in range(4 * shard, 4 * shard + 4):
            entries[f"{number:04d}.png"] = _picture(number)
            entries[f"{number:04d}.cls"] = str(number % 3).encode()
            entries[f"{number:04d}.json"] = b"{}"
        _pack(tmp_path / f"places-{shard:06d}.tar", entries)
    return tmp_path


def _shades(shards: Shards) -> list[int]:
    loaded = (shards.load(index, Draws(0)) for index in range(len(shards)))
    return [int(np.asarray(image)[0, 0]) for image in loaded]


@pytest.mark.parametrize(
    "pattern", ["", "*.tar", "places-{000000..000002}.tar", "places-00000[012].tar"]
)
def test_every_picture_in_order(places: Path, pattern: str) -> None:
    shards = Shards(places / pattern)
    assert _shades(shards) == list(range(12))
    assert shards.name(5) == "places-000001/0005.png"
    assert _shades(pickle.loads(pickle.dumps(shards))) == list(range(12))


def test_patterns(places: Path) -> None:
    def numbers(pattern: str) -> list[int]:
        return [int(path[-5]) for path in find_shards(str(places / pattern))]

    assert numbers("places-{000002,000000}.tar") == [2, 0]
    assert numbers("{places,places}-{000000..000001}.tar") == [0, 1, 0, 1]
    assert numbers("places-{000001..000001}.tar") == [1]
    (places / "odd[1]{2}.tar").write_bytes((places / "places-000000.tar").read_bytes())
    assert len(Shards(places / "odd[1]{2}.tar")) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("places-{000000..000003}.tar", r"places-000003\.tar: no such file"),
        ("places-{0..99999999999}.tar", r"places-0\.tar: no such file"),
        ("places-{3..1}.tar", r"\{3\.\.1\} counts down"),
        ("*.zip", r"\*\.zip: no such file"),
        ("empty", r"empty: no \.tar in this folder"),
    ],
)
def test_patterns_of_nothing(places: Path, pattern: str, message: str) -> None:
    (places / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        Shards(places / pattern)


@pytest.mark.parametrize("path", ["https://host/a.tar", "pipe:cat a.tar", "s3://bucket/{0..3}.tar"])
def test_only_local_paths(path: str) -> None:
    with pytest.raises(ValueError, match="is no local path"):
        find_shards(path)


def test_large_jpegs_are_decoded_small(tmp_path: Path) -> None:
    _pack(tmp_path / "a.tar", {"a.JPEG": _picture(9, (1600, 1200), "JPEG")})
    assert Shards(tmp_path, image_size=(32, 32)).load(0, Draws(0)).size == (100, 75)


def test_classes_from_files(places: Path) -> None:
    source = open_source("shards", str(places), image_size=(8, 8), classes=3)
    loaded = [source.load(index, Draws(0)) for index in range(12)]
    assert all(isinstance(given, Labelled) for given in loaded)
    assert [given.label for given in loaded] == [n % 3 for n in range(12)]  # type: ignore[union-attr]
    plain = open_source("shards", str(places), image_size=(8, 8))
    assert isinstance(plain.load(0, Draws(0)), Image.Image)
    with pytest.raises(ValueError, match=r"0002\.png is of class 2, but there are 2, from 0"):
        Shards(places, classes=2)


def test_classes_from_folders(tmp_path: Path) -> None:
    entries = {
        f"{name}/{n}.png": _picture(n) for n, name in enumerate(("dog", "cat", "ant", "dog"))
    }
    _pack(tmp_path / "a.tar", entries)
    assert Shards(tmp_path, classes=3).labels.tolist() == [2, 1, 0, 2]
    with pytest.raises(ValueError, match=r"has 3 folders of classes, but model\.num_classes is 2"):
        Shards(tmp_path, classes=2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a.png": b"", "a.cls": b"0", "b.png": b""}, r"a/b\.png has no \.cls file beside it"),
        ({"x/a.png": b"", "b.png": b""}, r"a/b\.png has neither a \.cls file nor a folder"),
        ({"a.png": b"", "a.cls": b"cat"}, r"a\.tar/a\.cls: holds no class; a decimal number"),
        ({"a.png": b"", "a.cls": b""}, r"a\.tar/a\.cls: holds no class; a decimal number"),
        ({"a.png": b"", "a.cls": b"9" * 40}, r"a\.tar/a\.cls: holds no class; a decimal number"),
        ({"a.png": b"", "a.seg.png": b""}, r"a\.png and a\.seg\.png are of one sample"),
        ({"a.txt": b"", ".b.png": b""}, "no image in these archives"),
    ],
)
def test_archives_that_will_not_do(tmp_path: Path, entries: dict[str, bytes], message: str) -> None:
    _pack(tmp_path / "a.tar", entries)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, classes=1)


def test_hostile_members_are_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _pack(tmp_path / "a.tar", {"../out.png": _picture(1), "a.png": _picture(2), "/b.png": b""})
    with caplog.at_level(logging.WARNING):
        shards = Shards(tmp_path)
    assert _shades(shards) == [2]
    assert re.search(r"a\.tar: left out 2; the first: \.\./out\.png: its name", caplog.text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_broken_pictures_are_skipped_by_name(tmp_path: Path) -> None:
    entries = {f"{n:03d}.png": _picture(n) for n in range(40)}
    entries |= {"007.png": b"no picture", "008.png": b"", "009.png": _picture(9)[:45]}
    _pack(tmp_path / "a.tar", entries)
    shards = Shards(tmp_path)
    for index, message in ((7, "not an image"), (8, "empty file"), (9, "damaged image")):
        with pytest.raises(UnreadableImage, match=rf"a\.tar/{index:03d}\.png: {message}"):
            shards.load(index, Draws(0))
    dataset = TaskDataset(shards, colorize, 8, 0, shuffle=False)
    assert [name for name, _ in dataset[0, 7]["skipped"]] == ["a/007.png"]


def test_an_archive_that_shrinks_while_it_is_read(places: Path) -> None:
    shards = Shards(places)
    path = places / "places-000002.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UnreadableImage, match=r"places-000002\.tar/0009\.png: the archive was"):
        shards.load(9, Draws(0))
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"0009\.png: No such file"):
        shards.load(9, Draws(0))


def test_a_picture_takes_few_bytes(tmp_path: Path) -> None:
    _pack(tmp_path / "a.tar", {f"ILSVRC2012_val_{n:08d}.png": b"" for n in range(500)})
    shards = Shards(tmp_path)
    assert shards.nbytes < 60 * len(shards)
    assert len(pickle.dumps(shards)) < 60 * len(shards) + 2000


def test_any_number_of_workers_gives_the_same_samples(places: Path) -> None:
    dataset = TaskDataset(Shards(places), colorize, 8, 3)
    batches = [
        list(Loader(dataset, Batches(12, 5, stop=24), workers=workers)) for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert one["name"] == other["name"]
        assert (one["target"] == other["target"]).all()


def test_shards_by_config(places: Path) -> None:
    sections = {
        "data": {"source": "shards", "path": str(places), "image_size": 8, "validation": 2},
        "task": {"name": "generate"},
        "model": {"num_classes": 3},
    }
    training, held_out = build_datasets(from_sections(sections))
    assert held_out is not None
    assert "label" in training[0, 0]
    assert not {training[0, n]["name"] for n in range(len(training))} & {held_out[0, 0]["name"]}
    sections["model"] = {}
    assert "label" not in build_datasets(from_sections(sections))[0][0, 0]
    del sections["data"]["path"]
    with pytest.raises(ConfigError, match=r"data\.path is needed with data\.source=shards"):
        from_sections(sections)
