"""Pictures in tar archives, in the layout of webdataset, read in any order.

The files of one sample follow each other and are named alike up to the first dot after the last
slash: ``a/0001.jpg`` and ``a/0001.cls``. Each archive is gone through once for where its files
lie; after that a picture is one read of the archive. Nothing is ever unpacked to the disk.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from palette.data import images
from palette.data.order import Draws
from palette.data.paths import EXTENSIONS, Paths, printable
from palette.data.tar import Member, members

_LOG = logging.getLogger(__name__)

_MAX_BYTES = 2**30  # of one image file: no picture within images.MAX_PIXELS takes more
_MAX_LABEL_DIGITS = 9
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards:
    """The pictures of tar archives, archive by archive, in the order in which they lie there.

    ``path``: see :func:`find_shards`. ``image_size`` (height, width) and ``detail`` as of
    ``sources.Folder``. ``classes``: how many there are, where ``labels`` (int32 [N], from 0) are
    wanted: from the ``.cls`` file of each sample, a decimal number, or, where there is none at all,
    from the outermost folder it lies in, in order of names.

    Links, devices and names that lead out of the archive are left out, with one line in the log.
    Raises ValueError when there is no archive or no picture, when an archive is damaged or cut
    off, a sample has several pictures, or the labels are not those wanted.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_size: tuple[int, int] | None = None,
        detail: int = 2,
        classes: int | None = None,
    ) -> None:
        self._archives = find_shards(path)
        self._at_least = image_size and (detail * image_size[0], detail * image_size[1])
        names, index, labels, ends = bytearray(), array("q"), array("i"), []
        name_ends = array("q")
        for archive in self._archives:
            for sample, label in _samples(archive, labelled=classes is not None):
                names += os.fsencode(sample.name)
                name_ends.append(len(names))
                index.extend((sample.offset, sample.size))
                labels.append(label)
            ends.append(len(labels))
        if not labels:
            raise ValueError(f"{printable(path)}: no image in these archives")
        self._names = Paths("", bytes(names), np.array(name_ends, dtype=np.int64))
        self._index: npt.NDArray[np.int64] = np.array(index, dtype=np.int64).reshape(-1, 2)
        self._ends = np.array(ends)
        self.labels = np.array(labels if classes is not None else (), dtype=np.int32)
        if classes is not None:
            self._check_labels(classes, printable(path))

    def __len__(self) -> int:
        return len(self._index)

    def load(self, index: int, draws: Draws) -> Image.Image:
        offset, size = (int(number) for number in self._index[index])
        where = f"{printable(self._archive(index))}/{self._names.name(index)}"
        if size > _MAX_BYTES:
            raise images.UnreadableImage(f"{where}: {size} bytes are too many for an image")
        try:
            with open(self._archive(index), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise images.UnreadableImage(f"{where}: {error.strerror}") from None
        if len(data) < size:
            raise images.UnreadableImage(f"{where}: the archive was changed, and ends before it")
        return images.read_bytes(data, where, at_least=self._at_least)

    def name(self, index: int) -> str:
        archive = os.path.splitext(os.path.basename(self._archive(index)))[0]
        return f"{printable(archive)}/{self._names.name(index)}"

    @property
    def nbytes(self) -> int:
        """Memory held for all pictures."""
        return self._names.nbytes + self._index.nbytes + self.labels.nbytes

    def _archive(self, index: int) -> str:
        return self._archives[int(np.searchsorted(self._ends, index, side="right"))]

    def _check_labels(self, classes: int, where: str) -> None:
        if (self.labels < 0).all():
            self._label_by_folder(classes, where)
        missing = np.flatnonzero(self.labels < 0)
        if missing.size:
            name = self.name(int(missing[0]))
            raise ValueError(f"{where}: {name} has no .cls file beside it, others have one")
        top = int(self.labels.max())
        if top >= classes:
            name = self.name(int(self.labels.argmax()))
            raise ValueError(
                f"{where}: {name} is of class {top}, but there are {classes}, from 0 "
                "(model.num_classes)"
            )

    def _label_by_folder(self, classes: int, where: str) -> None:
        found: dict[str, int] = {}  # folder to the number of those met before it
        met = array("i")
        for index in range(len(self)):
            folder, slash, _ = self._names[index].partition("/")
            if not slash:
                raise ValueError(
                    f"{where}: {self.name(index)} has neither a .cls file nor a folder to tell its "
                    "class; model.num_classes=null for none"
                )
            met.append(found.setdefault(folder, len(found)))
        if len(found) != classes:
            raise ValueError(
                f"{where}: has {len(found)} folders of classes, but model.num_classes is {classes}"
            )
        label = np.empty(classes, dtype=np.int32)
        label[[found[folder] for folder in sorted(found)]] = np.arange(classes)
        self.labels = label[np.array(met)]


def find_shards(path: str | os.PathLike[str]) -> list[str]:
    """Archives by the path of one, of a folder (its ``*.tar``), or by a pattern, in order of names.

    A pattern may have the wildcards ``*``, ``?`` and ``[…]``, and braces: ``{000000..000123}``
    counts, with as many digits as are written, ``{train,val}`` lists.
    Raises ValueError when something named is missing.
    """
    text = os.fspath(path)
    if re.match(r"\w+://|pipe:", text):
        raise ValueError(f"{printable(text)}: is no local path; shards must lie on this machine")
    if os.path.isdir(text):
        found = sorted(glob.glob(os.path.join(glob.escape(text), "*.tar")))
        if not found:
            raise ValueError(f"{printable(text)}: no .tar in this folder")
        return found
    if os.path.exists(text):
        return [text]
    archives: list[str] = []
    for one in _expanded(text):
        matching = [one] if os.path.exists(one) else sorted(glob.glob(one))
        if not matching:
            raise ValueError(
                f"{printable(one)}: no such file; shards are .tar files by path, folder or pattern"
            )
        archives += matching
    return archives


def _expanded(pattern: str) -> Iterator[str]:
    """A pattern without its braces, one text for each thing they stand for."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    counting = _RANGE.fullmatch(braces[1])
    if counting:
        first, last = int(counting[1]), int(counting[2])
        if last < first:
            raise ValueError(f"{printable(pattern)}: {braces[0]} counts down")
        width = len(counting[1])
        choices: Iterator[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
    else:
        choices = iter(braces[1].split(","))
    for choice in choices:
        yield from _expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _samples(archive: str, *, labelled: bool) -> Iterator[tuple[Member, int]]:
    """The picture of each sample and its class; -1 where none is given or ``labelled`` is False."""
    key, picture, label = "", None, -1
    refused: list[Member] = []
    for member in members(archive):
        folder, _, file = member.name.rpartition("/")
        if member.refused:
            refused.append(member)
            continue
        if file.startswith("."):
            continue
        stem, _, ending = file.partition(".")
        if f"{folder}/{stem}" != key:
            if picture is not None:
                yield picture, label
            key, picture, label = f"{folder}/{stem}", None, -1
        if os.path.splitext(file)[1].lower() in EXTENSIONS:
            if picture is not None:
                raise ValueError(
                    f"{printable(archive)}: {printable(picture.name)} and {printable(file)} are "
                    "of one sample, named alike up to the first dot; one image a sample is wanted"
                )
            picture = member
        elif labelled and ending.lower() == "cls":
            label = _label(archive, member)
    if picture is not None:
        yield picture, label
    if refused:
        first = f"{printable(refused[0].name)}: {refused[0].refused}"
        _LOG.warning("%s: left out %d; the first: %s", printable(archive), len(refused), first)


def _label(archive: str, member: Member) -> int:
    with open(archive, "rb", buffering=0) as file:
        text = os.pread(file.fileno(), min(member.size, 64), member.offset).strip()
    if not text.isdigit() or len(text) > _MAX_LABEL_DIGITS:
        raise ValueError(
            f"{printable(archive)}/{printable(member.name)}: holds no class; "
            "a decimal number from 0 is wanted"
        )
    return int(text)
