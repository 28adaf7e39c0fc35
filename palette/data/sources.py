"""Where pictures come from: the sample photographs, a folder, a list, shards, pairs, classes.

A source is anything with a length, ``load(index, draws)`` and ``name(index)``. It hands out
pictures of any size; the dataset crops and resizes what has not the wanted size yet.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

from PIL import Image

from palette.data import images, paths
from palette.data.order import Draws
from palette.data.photos import Photos
from palette.data.shards import Shards


class Pair(NamedTuple):
    """A picture and the condition that belongs to it."""

    target: Image.Image
    condition: Image.Image


class Labelled(NamedTuple):
    """A picture and the number of its class, from 0."""

    image: Image.Image
    label: int


Given = Image.Image | Pair | Labelled
"""What a source hands out."""


class Source(Protocol):
    """Pictures by number."""

    def __len__(self) -> int:
        """How many samples an epoch has."""

    def load(self, index: int, draws: Draws) -> Given:
        """A picture, mode "L" or "RGB", or two, or one with its class.

        Every random choice comes from ``draws``. Raises palette.data.images.UnreadableImage when
        there is none to be had.
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
    classes: int | None = None,
) -> Source:
    """The source that a config names; ``conditions`` and ``names`` are those of :class:`Pairs`.

    ``classes`` is that of ``shards.Shards``: how many there are, where labels are wanted of it.

    Raises ValueError when there is none of that name.
    """
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(sorted(SOURCES))}, got '{name}'")
    given = {"conditions": conditions, "names": names, "classes": classes}
    extra = {key: value for key, value in given.items() if value}
    return SOURCES[name](path, image_size=image_size, detail=detail, **extra)


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

    def relative(self, index: int) -> str:
        """Path below the folder."""
        return self._paths[index]

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
    Raises ValueError when a folder or the list is missing or empty, a name leads out of its folder,
    or one of a pair is missing.
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
            for name in found:
                if os.path.isabs(name) or ".." in name.split("/"):
                    raise ValueError(
                        f"{os.fspath(names)}: '{paths.printable(name)}' leads out of {targets}; "
                        "names below it are wanted"
                    )
            self._targets = paths.Paths.of(targets, found)
        else:
            self._targets = paths.scan(targets)
        self._conditions = partners
        self._at_least = image_size and (detail * image_size[0], detail * image_size[1])
        for index in range(len(self)):
            both = ((targets, self._targets.path(index)), (partners, self._partner(index)))
            for folder, what in both:
                if not os.path.exists(what):
                    name = self._targets.name(index)
                    raise ValueError(f"{folder}: no {name} in it; pairs need both")

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


class Classes:
    """Every image below the folders of a folder, one folder per class, classes in order of names.

    Arguments as of :class:`Folder`. Raises ValueError when there is no class, one without an
    image, or an image that lies in none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_size: tuple[int, int] | None = None,
        detail: int = 2,
    ) -> None:
        self._labels = {name: label for label, name in enumerate(class_names(path))}
        self._folder = Folder(path, image_size=image_size, detail=detail)
        found = {self._class(index) for index in range(len(self))}
        for name in self._labels:
            if name not in found:
                raise ValueError(f"{os.path.join(path, name)}: no image of this class in it")
        loose = found.difference(self._labels)
        if loose:
            where = os.path.join(path, min(loose))
            raise ValueError(f"{where}: lies in no class; one folder per class is wanted")

    def __len__(self) -> int:
        return len(self._folder)

    def load(self, index: int, draws: Draws) -> Labelled:
        return Labelled(self._folder.load(index, draws), self._labels[self._class(index)])

    def name(self, index: int) -> str:
        return self._folder.name(index)

    def _class(self, index: int) -> str:
        return self._folder.relative(index).split(os.sep, 1)[0]


class LabelledShards:
    """The pictures of shards with their labels."""

    def __init__(self, source: Shards) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int, draws: Draws) -> Labelled:
        return Labelled(self._source.load(index, draws), int(self._source.labels[index]))

    def name(self, index: int) -> str:
        return self._source.name(index)


def class_names(path: str | os.PathLike[str]) -> list[str]:
    """The folders of a folder in order of names: class 0, 1, …. Raises ValueError without any."""
    root = os.fspath(path)
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder; one with a folder per class is wanted")
    names = [
        name
        for name in sorted(os.listdir(root))
        if not name.startswith(".") and os.path.isdir(os.path.join(root, name))
    ]
    if not names:
        raise ValueError(f"{root}: no folder in it; one folder per class is wanted")
    return names


@register_source("classes")
def _classes(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Classes(path, image_size=image_size, detail=detail)


@register_source("photos")
def _photos(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Photos(image_size=image_size)


@register_source("folder")
def _folder(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return Folder(path, image_size=image_size, detail=detail)


@register_source("list")
def _list(path: str, *, image_size: tuple[int, int], detail: int) -> Source:
    return List(path, image_size=image_size, detail=detail)


@register_source("shards")
def _shards(
    path: str, *, image_size: tuple[int, int], detail: int, classes: int | None = None
) -> Source:
    shards = Shards(path, image_size=image_size, detail=detail, classes=classes)
    return shards if classes is None else LabelledShards(shards)


@register_source("pairs")
def _pairs(
    path: str, *, image_size: tuple[int, int], detail: int, conditions: str = "", names: str = ""
) -> Source:
    return Pairs(path, conditions=conditions, names=names, image_size=image_size, detail=detail)


def _published_name(listed: str) -> str:
    return listed if os.path.splitext(listed)[1] else f"{listed.strip().zfill(5)}.png"


def _size(image: Image.Image) -> int:
    return image.width * image.height * (4 if image.mode == "RGB" else 1)
