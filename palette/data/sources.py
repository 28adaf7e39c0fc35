"""Where pictures come from: the sample photographs, a folder, a list.

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
from typing import Literal, Protocol

from PIL import Image

from palette.data import images, paths
from palette.data.order import Draws

Split = Literal["train", "validation"]


class Source(Protocol):
    """Pictures by number."""

    def __len__(self) -> int:
        """How many samples an epoch has."""

    def load(self, index: int, draws: Draws) -> Image.Image:
        """A picture, mode "L" or "RGB"; every random choice comes from ``draws``.

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


def open_source(name: str, path: str, *, image_size: tuple[int, int], detail: int = 2) -> Source:
    """The source that a config names. Raises ValueError when there is none of that name."""
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(sorted(SOURCES))}, got '{name}'")
    return SOURCES[name](path, image_size=image_size, detail=detail)


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
    """The images that a text file lists; see :func:`paths.read_list`. Arguments as of Folder."""

    @staticmethod
    def _find(path: str | os.PathLike[str]) -> paths.Paths:
        return paths.read_list(path)


class HeldOut:
    """``count`` pictures of a source, spread evenly over it, for ``samples`` validation samples.

    With more samples than pictures, pictures come again (with other crops).
    """

    def __init__(self, source: Source, count: int, samples: int) -> None:
        self._source, self._count, self._samples = source, count, samples

    def __len__(self) -> int:
        return self._samples

    def load(self, index: int, draws: Draws) -> Image.Image:
        return self._source.load(self._index(index), draws)

    def name(self, index: int) -> str:
        name, again = self._source.name(self._index(index)), index // self._count
        return f"{name}-{again}" if again else name

    def _index(self, index: int) -> int:
        return index % self._count * (len(self._source) // self._count)


class Remainder:
    """The pictures of a source that :class:`HeldOut` with the same ``count`` leaves."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def __len__(self) -> int:
        return len(self._source) - self._count

    def load(self, index: int, draws: Draws) -> Image.Image:
        return self._source.load(self._index(index), draws)

    def name(self, index: int) -> str:
        return self._source.name(self._index(index))

    def _index(self, index: int) -> int:
        between = len(self._source) // self._count - 1  # pictures after each one held out
        return index + 1 + min(index // between, self._count - 1)


def hold_out(source: Source, samples: int) -> tuple[Source, Source | None]:
    """Training and validation sources with no picture in common, always the same ones.

    A tenth of the pictures is held out, but no more than ``samples``; fewer pictures than samples
    come several times, with other crops. ``samples`` 0 holds nothing out. Raises ValueError when
    there is only one picture.
    """
    if samples == 0:
        return source, None
    if len(source) < 2:
        raise ValueError("validation: one picture cannot be held out of one; 0 holds out none")
    count = min(samples, max(1, len(source) // 10))
    return Remainder(source, count), HeldOut(source, count, samples)


def open_split(
    name: str,
    path: str,
    *,
    image_size: tuple[int, int],
    detail: int = 2,
    samples: int = 4096,
    validation: int = 0,
) -> tuple[Source, Source | None]:
    """Training and validation sources of the kind ``name``, the second with ``validation`` samples.

    ``samples`` is the length of an epoch where the source itself has none (photos). ``detail`` is
    how many times ``image_size`` pictures should at least have on each side. Raises ValueError.
    """
    if name == "photos":
        held = Photos("validation", image_size=image_size, samples=validation or 1)
        return Photos(image_size=image_size, samples=samples), held if validation else None
    return hold_out(open_source(name, path, image_size=image_size, detail=detail), validation)


@register_source("photos")
def _photos(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Photos(image_size=image_size)


@register_source("folder")
def _folder(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Folder(path, image_size=image_size, detail=detail)


@register_source("list")
def _list(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return List(path, image_size=image_size, detail=detail)


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
