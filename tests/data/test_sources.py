"""Sources: the sample photographs, folders, lists, and pictures held out of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palette.data import sources
from palette.data.images import UnreadableImage
from palette.data.order import Draws
from palette.data.photos import Photos, photograph
from palette.data.sources import (
    SOURCES,
    Folder,
    List,
    Source,
    open_source,
    register_source,
)
from palette.data.split import hold_out, open_split


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    """A folder of so many pictures, each of one grey: its number."""

    def make(count: int) -> Path:
        where = tmp_path / "images"
        where.mkdir()
        for number in range(count):
            Image.new("RGB", (30, 20), (number,) * 3).save(where / f"{number:04d}.png")
        return where

    return make


def _shade(source: Source, index: int) -> int:
    return int(np.asarray(source.load(index, Draws(0)))[0, 0, 0])


def test_the_photographs_are_colour_pictures() -> None:
    for file, _ in Photos.PHOTOGRAPHS:
        with Image.open(photograph(file)) as picture:
            assert picture.mode == "RGB"
            assert min(picture.size) >= 300
    with pytest.raises(ValueError, match=r"nothing\.png: missing"):
        photograph("nothing.png")


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (24, 160), (256, 256)])
def test_photos_come_at_the_wanted_size(split: sources.Split, size: tuple[int, int]) -> None:
    photos = Photos(split, image_size=size, samples=20)
    assert len(photos) == 20
    for index in range(9):
        image = photos.load(index, Draws(index))
        assert image.size == (size[1], size[0])
        assert image.mode == "RGB"


def test_photos_follow_their_draws() -> None:
    photos = Photos(image_size=(32, 32))
    again = pickle.loads(pickle.dumps(photos))
    for index in (0, 5, 9):
        first, same = photos.load(index, Draws(3)), again.load(index, Draws(3))
        assert first.tobytes() == same.tobytes()
        assert first.tobytes() != photos.load(index, Draws(4)).tobytes()
    assert len(pickle.dumps(photos)) < 1000


def test_validation_crops_touch_nothing_that_training_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are black where training crops come from, and white in the rest."""

    def painted(path: Path) -> Image.Image:
        side = dict(Photos.PHOTOGRAPHS)[path.name]
        picture = Image.new("RGB", (501, 403))
        strip = round((501 if side in ("left", "right") else 403) * Photos.VALIDATION_PART)
        box = {
            "left": (0, 0, strip, 403),
            "right": (501 - strip, 0, 501, 403),
            "top": (0, 0, 501, strip),
            "bottom": (0, 403 - strip, 501, 403),
        }[side]
        picture.paste((255, 255, 255), box)
        return picture

    monkeypatch.setattr(sources.images, "read", painted)
    for split, value in (("train", 0), ("validation", 255)):
        photos = Photos(split, image_size=(16, 24), samples=90)  # type: ignore[arg-type]
        for index in range(90):
            assert (np.asarray(photos.load(index, Draws(index))) == value).all()


def test_stereo_views_are_divided_by_rows() -> None:
    """The left view shows at other columns what the right one shows, but never at other rows."""
    sides = {side for file, side in Photos.PHOTOGRAPHS if file.startswith("motorcycle")}
    assert len(sides) == 1
    assert sides <= {"top", "bottom"}


def test_crops_of_photos_have_many_scales() -> None:
    """Fine detail (coarse crops are smooth) differs between crops of one picture."""
    photos = Photos(image_size=(32, 32))
    detail = []
    for number in range(60):
        pixels = np.asarray(photos.load(4, Draws(number)), float)  # the retina
        detail.append(np.abs(np.diff(pixels, axis=1)).mean())
    assert max(detail) > 3 * min(detail)


def test_photos_are_named_for_their_picture() -> None:
    photos = Photos(image_size=(8, 8))
    assert photos.name(0) == "astronaut-000000"
    assert photos.name(10) == "chelsea-000010"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be 'train' or 'validation', got 'test'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Photos(image_size=(8, 8), **arguments)  # type: ignore[arg-type]


def test_folder(folder: Callable[[int], Path]) -> None:
    source = Folder(folder(5))
    assert len(source) == 5
    assert [_shade(source, index) for index in range(5)] == list(range(5))
    assert source.name(3) == "0003.png"
    assert source.load(0, Draws(0)).size == (30, 20)


def test_folder_decodes_no_more_than_it_must(tmp_path: Path) -> None:
    Image.new("RGB", (1600, 1200), (10, 20, 30)).save(tmp_path / "large.jpg")
    assert Folder(tmp_path, image_size=(32, 32)).load(0, Draws(0)).size == (100, 75)
    assert Folder(tmp_path, image_size=(32, 32), detail=8).load(0, Draws(0)).size == (400, 300)
    assert Folder(tmp_path).load(0, Draws(0)).size == (1600, 1200)


def test_folder_keeps_pictures_up_to_a_limit(folder: Callable[[int], Path]) -> None:
    path = folder(6)
    source = Folder(path, image_size=(4, 4), cache=3 * 15 * 10 * 4)
    kept = Folder(path, image_size=(4, 4))
    before = [[_shade(each, index) for index in range(6)] for each in (source, kept)]
    for file in path.iterdir():
        file.unlink()
    assert [_shade(kept, index) for index in range(6)] == before[1]
    assert before[0] == before[1]
    with pytest.raises(UnreadableImage, match=r"0000\.png: No such file"):
        source.load(0, Draws(0))


def test_list(folder: Callable[[int], Path]) -> None:
    path = folder(4)
    (path / "some.txt").write_text("0002.png\n0000.png\nmissing.png\n")
    source = List(path / "some.txt")
    assert [_shade(source, index) for index in range(2)] == [2, 0]
    with pytest.raises(UnreadableImage, match=r"missing\.png: No such file"):
        source.load(2, Draws(0))


@pytest.mark.parametrize(
    ("count", "samples"), [(2, 1), (2, 64), (10, 64), (19, 3), (100, 7), (640, 64)]
)
def test_held_out_pictures_are_never_trained_on(
    folder: Callable[[int], Path], count: int, samples: int
) -> None:
    source = Folder(folder(count)) if count <= 100 else _Numbers(count)
    train, validation = hold_out(source, samples)
    assert validation is not None
    assert len(validation) == samples
    held = {validation.name(index).split("-")[0] for index in range(samples)}
    trained = [train.name(index) for index in range(len(train))]
    assert len(held) == min(samples, max(1, count // 10))
    assert not held & set(trained)
    assert sorted([*held, *trained]) == sorted(source.name(index) for index in range(count))
    names = [validation.name(index) for index in range(samples)]
    assert len(set(names)) == samples


class _Numbers:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, draws: Draws) -> Image.Image:
        return Image.new("L", (1, 1))

    def name(self, index: int) -> str:
        return f"{index:05d}"


def test_so_many_pictures_held_out_and_no_more() -> None:
    train, validation = hold_out(_Numbers(10), 4, pictures=4)
    assert validation is not None
    assert (len(train), len(validation)) == (6, 4)
    names = [part.name(i) for part in (train, validation) for i in range(len(part))]
    assert sorted(names) == [f"{number:05d}" for number in range(10)]
    with pytest.raises(ValueError, match="6 of 10 pictures cannot be held out, at most half"):
        hold_out(_Numbers(10), 6, pictures=6)


def test_the_first_pictures(folder: Callable[[int], Path]) -> None:
    path = str(folder(12))
    train, validation = open_split("folder", path, image_size=(8, 8), limit=5)
    assert validation is None
    assert [train.name(index) for index in range(len(train))] == [f"{i:04d}.png" for i in range(5)]
    assert len(open_split("folder", path, image_size=(8, 8), limit=99)[0]) == 12


def test_a_list_may_be_meant_from_the_working_directory(
    folder: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(3)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.flist").write_text("images/0002.png\nimages/0001.png\n")
    monkeypatch.chdir(tmp_path)
    source = List(tmp_path / "lists" / "all.flist")
    assert [_shade(source, index) for index in range(2)] == [2, 1]


def test_nothing_or_too_much_held_out() -> None:
    source = _Numbers(5)
    assert hold_out(source, 0) == (source, None)
    with pytest.raises(ValueError, match="one picture cannot be held out of one"):
        hold_out(_Numbers(1), 4)


def test_sources_by_name(folder: Callable[[int], Path]) -> None:
    path = folder(20)
    train, validation = open_split("folder", str(path), image_size=(8, 8), validation=4)
    assert validation is not None
    assert (len(train), len(validation)) == (18, 4)
    train, validation = open_split("photos", "", image_size=(8, 8), samples=50, validation=6)
    assert validation is not None
    assert (len(train), len(validation)) == (50, 6)
    assert open_split("photos", "", image_size=(8, 8))[1] is None
    (path / "all.txt").write_text("0001.png")
    assert len(open_source("list", str(path / "all.txt"), image_size=(8, 8))) == 1
    with pytest.raises(ValueError, match=r"source must be one of .*folder.*, got 'foldr'"):
        open_source("foldr", "", image_size=(8, 8))


def test_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SOURCES", dict(SOURCES))

    @register_source("numbers")
    def build(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
        return _Numbers(int(path))

    assert len(open_source("numbers", "7", image_size=(8, 8))) == 7
    with pytest.raises(ValueError, match="'numbers' is registered already"):
        register_source("numbers")(build)


def _class_folders(root: Path, **counts: int) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name / "deeper").mkdir(parents=True)
        for index in range(count):
            picture = Image.new("L", (8, 8), 10 * number + index)
            picture.save(root / name / "deeper" / f"{index}.png")
    return root


def test_classes_are_folders_in_order_of_names(tmp_path: Path) -> None:
    _class_folders(tmp_path, dog=2, ant=3)
    (tmp_path / ".hidden").mkdir()
    source = open_source("classes", str(tmp_path), image_size=(8, 8))
    loaded = [source.load(index, Draws(0)) for index in range(len(source))]
    found = [(given.label, given.image.getpixel((0, 0))) for given in loaded]  # type: ignore[union-attr]
    assert found == [(0, 10), (0, 11), (0, 12), (1, 0), (1, 1)]
    assert source.name(4) == "dog/deeper/1.png"
    assert sources.class_names(tmp_path) == ["ant", "dog"]


def test_classes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        sources.class_names(tmp_path / "no")
    with pytest.raises(ValueError, match="no folder in it; one folder per class"):
        sources.Classes(tmp_path)
    _class_folders(tmp_path, ant=1, bee=0)
    with pytest.raises(ValueError, match=r"bee: no image of this class"):
        sources.Classes(tmp_path)
    (tmp_path / "bee" / "deeper").rmdir()
    (tmp_path / "bee").rmdir()
    Image.new("L", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png: lies in no class"):
        sources.Classes(tmp_path)
