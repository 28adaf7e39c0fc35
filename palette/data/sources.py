"""Where pictures come from: the sample photographs, a folder, a list, pairs.

A source is anything with a length, ``load(index, draws)`` and ``name(index)``. It hands out
pictures of any size; the dataset crops and resizes what has not the wanted size yet.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from PIL import Image

from palette.data import images, paths
from palette.data.order import Draws

Split = Literal["train", "validation"]


class Pair(NamedTuple):
    """A picture and the condition that belongs to it."""

    target: Image.Image
    condition: Image.Image


class Source(Protocol):
    """Pictures by number."""

    def __len__(self) -> int:
        """How many samples an epoch has."""

    def load(self, index: int, draws: Draws) -> Image.Image | Pair:
        """A picture, mode "L" or "RGB", or two; every random choice comes from ``draws``.

        Raises palette.data.images.UnreadableImage when there is none to be had.
        """

    def name(self, index: int) -> str:
        """A printable name, fit to be part of a file name below some folder."""


SOURCES: dict[str, Callable[..., Source]] = {}


def register_source(name: str) -> Callable[[Callable[..., Source]], Callable[..., Source]]:
    """Decorator that lets a config name a source: ``data.source: <name>``.

    The class or function is called with ``path`` (str) and, by keyword, ``image_size`` (height,
    width) and ``detail`` (int: pictures are best at least so many times that large; to be taken
    as advice). Raises ValueError when the name is taken.
    """

    def keep(builder: Callable[..., Source]) -> Callable[..., Source]:
        if name in SOURCES:
            raise ValueError(f"name: a source called '{name}' is registered already")
        SOURCES[name] = builder
        return builder

    return keep


def open_source(
    name: str,
    path: str,
    *,
    image_size: tuple[int, int],
    detail: int = 2,
    conditions: str = "",
    names: str = "",
) -> Source:
    """The source that a config names; ``conditions`` and ``names`` are those of :class:`Pairs`.

    Raises ValueError when there is none of that name.
    """
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(sorted(SOURCES))}, got '{name}'")
    given = {"conditions": conditions, "names": names}
    extra = {key: value for key, value in given.items() if value}
    return SOURCES[name](path, image_size=image_size, detail=detail, **extra)


class Photos:
    """Random crops of nine colour photographs that ship inside scikit-image; nothing is downloaded.

    Each picture is cut in two: validation crops come from a strip (:data:`PHOTOGRAPHS`) that no
    training crop touches. The crop's side is drawn log-uniformly from the wanted size up to all of
    the region; index modulo 9 chooses the picture. Pictures are decoded once, halved repeatedly,
    and a crop is taken from the smallest level that has 1.5 times its pixels.
    """

    # File, and the side on which the validation strip lies. The two motorcycles are a stereo pair:
    # what one view shows the other shows in the same rows, so only rows may be held out.
    PHOTOGRAPHS = (
        ("astronaut.png", "right"),
        ("chelsea.png", "right"),
        ("coffee.png", "left"),
        ("rocket.jpg", "right"),
        ("retina.jpg", "right"),
        ("hubble_deep_field.jpg", "right"),
        ("ihc.png", "bottom"),
        ("motorcycle_left.png", "top"),
        ("motorcycle_right.png", "top"),
    )
    VALIDATION_PART = 0.3  # of the picture's width or height

    def __init__(
        self,
        split: Split = "train",
        *,
        image_size: tuple[int, int],
        samples: int = 4096,
    ) -> None:
        if split not in ("train", "validation"):
            raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self._split: Split = split
        self._size = image_size
        self._samples = samples
        self._levels: dict[int, list[Image.Image]] = {}

    def __len__(self) -> int:
        return self._samples

    def load(self, index: int, draws: Draws) -> Image.Image:
        levels = self._pyramid(index % len(self.PHOTOGRAPHS))
        full, size = levels[0], self._size
        room = min(full.height / size[0], full.width / size[1])
        zoom = max(room, 1.0) ** draws.real()
        box = images.crop_box(
            (full.height, full.width), size, x=draws.real(), y=draws.real(), zoom=zoom
        )
        reduction = (box[2] - box[0]) / size[1]
        level = min(max(math.floor(math.log2(reduction / 1.5)), 0), len(levels) - 1)
        scaled = (box[0] / 2**level, box[1] / 2**level, box[2] / 2**level, box[3] / 2**level)
        return levels[level].resize((size[1], size[0]), Image.Resampling.LANCZOS, box=scaled)

    def name(self, index: int) -> str:
        file = self.PHOTOGRAPHS[index % len(self.PHOTOGRAPHS)][0]
        return f"{Path(file).stem}-{index:06d}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_levels": {}}  # decoded pictures need not travel to workers

    def _pyramid(self, number: int) -> list[Image.Image]:
        if number not in self._levels:
            file, side = self.PHOTOGRAPHS[number]
            picture = images.read(photograph(file)).convert("RGB")
            levels = [picture.crop(_region(picture.size, side, self._split, self.VALIDATION_PART))]
            while min(levels[-1].size) >= 32:
                levels.append(levels[-1].reduce(2))
            self._levels[number] = levels
        return self._levels[number]


def photograph(file: str) -> Path:
    """One of scikit-image's own pictures. Raises ValueError when the installation lacks it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("source 'photos' needs scikit-image: pip install scikit-image")
    path = Path(spec.origin).parent / "data" / file
    if not path.is_file():
        raise ValueError(f"{path}: missing; reinstall scikit-image from its wheel")
    return path


class Folder:
    """Every image below a folder, recursively, in order of names; see :func:`paths.scan`.

    ``image_size`` (height, width): pictures are decoded at a reduced scale of at least ``detail``
    times this size, which is many times as fast for photographs from a camera, and kept, up to
    ``cache`` bytes. Without it they come at their full size.
    Raises ValueError when the folder is missing or holds no image.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_size: tuple[int, int] | None = None,
        detail: int = 2,
        cache: int = 2**26,
    ) -> None:
        self._paths = self._find(path)
        self._at_least = image_size and (detail * image_size[0], detail * image_size[1])
        self._limit = cache if image_size else 0
        self._cache: OrderedDict[int, Image.Image] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int, draws: Draws) -> Image.Image:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        image = images.read(self._paths.path(index), at_least=self._at_least)
        self._cache[index] = image
        self._held += _size(image)
        while self._held > self._limit:
            self._held -= _size(self._cache.popitem(last=False)[1])
        return image

    def name(self, index: int) -> str:
        return self._paths.name(index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": OrderedDict(), "_held": 0}

    @staticmethod
    def _find(path: str | os.PathLike[str]) -> paths.Paths:
        return paths.scan(path)


class List(Folder):
    """The images that a text file lists; see :func:`paths.read_list`. Arguments as of Folder.

    Where the first one does not lie there, but does in the working directory, all are meant from
    that: so the published Palette code reads its lists.
    """

    @staticmethod
    def _find(path: str | os.PathLike[str]) -> paths.Paths:
        found = paths.read_list(path)
        if not os.path.exists(found.path(0)) and os.path.exists(found[0]):
            found.root = os.getcwd()
        return found


class Pairs:
    """A picture and its condition under the same name in two folders.

    Without ``conditions`` the folders are ``path``/color and ``path``/gray, as published Palette
    has them, and without ``names``, a text file, every image below the first folder is taken. A
    name without an ending is, as published, a number of five digits: "7" is 00007.png.
    ``image_size`` and ``detail`` as of :class:`Folder`; pictures of a pair that differ in size are
    brought to the size of the target.
    Raises ValueError when a folder or the list is missing or empty, or a condition is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        conditions: str | os.PathLike[str] = "",
        names: str | os.PathLike[str] = "",
        image_size: tuple[int, int] | None = None,
        detail: int = 2,
    ) -> None:
        where = os.fspath(path)
        targets = where if conditions else os.path.join(where, "color")
        partners = os.fspath(conditions) or os.path.join(where, "gray")
        if names:
            listed = paths.read_list(names)
            found = [_published_name(listed[index]) for index in range(len(listed))]
            self._targets = paths.Paths.of(targets, found)
        else:
            self._targets = paths.scan(targets)
        self._conditions = partners
        self._at_least = image_size and (detail * image_size[0], detail * image_size[1])
        for folder, what in ((targets, self._targets.path(0)), (partners, self._partner(0))):
            if not os.path.exists(what):
                raise ValueError(f"{folder}: no {self._targets.name(0)} in it; pairs need both")

    def __len__(self) -> int:
        return len(self._targets)

    def load(self, index: int, draws: Draws) -> Pair:
        target = images.read(self._targets.path(index), at_least=self._at_least)
        condition = images.read(self._partner(index), at_least=self._at_least)
        if condition.size != target.size:
            condition = condition.resize(target.size, Image.Resampling.LANCZOS)
        return Pair(target, condition)

    def name(self, index: int) -> str:
        return self._targets.name(index)

    def _partner(self, index: int) -> str:
        return os.path.join(self._conditions, self._targets[index])


@register_source("photos")
def _photos(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Photos(image_size=image_size)


@register_source("folder")
def _folder(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Folder(path, image_size=image_size, detail=detail)


@register_source("list")
def _list(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return List(path, image_size=image_size, detail=detail)


@register_source("pairs")
def _pairs(
    path: str, *, image_size: tuple[int, int], detail: int, conditions: str = "", names: str = ""
) -> Source:
    return Pairs(path, conditions=conditions, names=names, image_size=image_size, detail=detail)


def _published_name(listed: str) -> str:
    return listed if os.path.splitext(listed)[1] else f"{listed.strip().zfill(5)}.png"


def _size(image: Image.Image) -> int:
    return image.width * image.height * (4 if image.mode == "RGB" else 1)


def _region(
    size: tuple[int, int], side: str, split: Split, part: float
) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of the strip on one side, or of all the rest."""
    width, height = size
    strip = round((width if side in ("left", "right") else height) * part)
    if split == "train":
        return {
            "left": (strip, 0, width, height),
            "right": (0, 0, width - strip, height),
            "top": (0, strip, width, height),
            "bottom": (0, 0, width, height - strip),
        }[side]
    return {
        "left": (0, 0, strip, height),
        "right": (width - strip, 0, width, height),
        "top": (0, 0, width, strip),
        "bottom": (0, height - strip, width, height),
    }[side]
