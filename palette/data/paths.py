"""Very many file paths in little memory, from a folder or from a list file."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

# What a folder is searched for, in any case of letters. Formats that Pillow decodes by itself.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
) | frozenset((".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".jp2", ".j2k", ".avif"))

_CHUNK = 1 << 24


class Paths:
    """A sequence of paths below one folder, each its bytes and 8 more.

    A Python list of ten million strings takes over a gigabyte, and worker processes, by counting
    references, copy it page by page; this is two blocks that nobody writes to.
    """

    def __init__(
        self, root: str, blob: bytes, ends: npt.NDArray[np.int64], separator: bytes = b""
    ) -> None:
        self.root = root
        self._blob = blob
        self._ends = ends  # where each path ends; ``separator`` lies between it and the next
        self._separator = separator

    @classmethod
    def of(cls, root: str, paths: Iterable[str]) -> Paths:
        """Paths from strings; those that are relative are meant from ``root``."""
        blob, ends = bytearray(), array("q")
        for path in paths:
            blob += os.fsencode(path)
            ends.append(len(blob))
        return cls(root, bytes(blob), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """Path as written: relative to ``root``, or absolute."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {index}")
        start = int(self._ends[index - 1]) + len(self._separator) if index else 0
        path = self._blob[start : int(self._ends[index])]
        return os.fsdecode(_without_return(path, self._separator))

    def path(self, index: int) -> str:
        """Where the file lies."""
        return os.path.join(self.root, self[index])

    def name(self, index: int) -> str:
        """A printable name of the file that never leads out of a folder it is joined to."""
        path = PurePath(self[index])
        return printable("/".join(part for part in path.parts if part not in ("..", path.anchor)))

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return len(self._blob) + self._ends.nbytes


def scan(folder: str | os.PathLike[str]) -> Paths:
    """Image files below a folder, at any depth, in order of their names.

    Files are taken by their extension; hidden ones are left out. Links are followed, and a folder
    that was already seen is not entered again. Raises ValueError when the folder is missing or
    holds no image.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        reason = "is a file, not a folder" if os.path.exists(root) else "no such folder"
        raise ValueError(f"{root}: {reason}; a folder of images is wanted")
    paths = Paths.of(root, _walk(root))
    if not len(paths):
        raise ValueError(
            f"{root}: no image in this folder or below (looked for {', '.join(sorted(EXTENSIONS))})"
        )
    return paths


def read_list(file: str | os.PathLike[str]) -> Paths:
    """Paths from a text file, relative to the folder it lies in.

    One path a line, or, where the file holds a NUL byte anywhere, one path up to each NUL (as
    ``find -print0`` writes), so that every name can be listed. Empty lines are left out.
    Raises ValueError when the file is missing or lists nothing.
    """
    where = os.fspath(file)
    try:
        with open(where, "rb") as handle:
            blob = handle.read()
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; a text file of paths is wanted") from None
    blob = blob.removeprefix(b"\xef\xbb\xbf")
    separator = b"\0" if b"\0" in blob else b"\n"
    root = os.path.dirname(os.path.abspath(where))
    if not blob.endswith(separator):
        blob += separator
    ends = _positions(blob, separator[0])
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).min() < 2:  # an empty line, perhaps with a carriage return
        lines = (_without_return(line, separator) for line in blob.split(separator))
        paths = Paths.of(root, (os.fsdecode(line) for line in lines if line))
    else:
        paths = Paths(root, blob, ends, separator)
    if not len(paths):
        raise ValueError(f"{where}: the list is empty; one path a line is wanted")
    return paths


def printable(path: str | os.PathLike[str]) -> str:
    """A path as one line that every terminal and log can take, whatever its name is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def _walk(root: str) -> Iterator[str]:
    """Relative paths of image files, folder by folder, each in order of names."""
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        here = os.path.join(root, relative) if relative else root
        try:
            facts = os.stat(here)
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{printable(here)}: {error.strerror}") from None
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders = []
        for entry in found:
            path = os.path.join(relative, entry.name)
            if entry.name.startswith("."):
                continue
            if os.path.isdir(os.path.join(root, path)):  # False too for a link that goes in circles
                folders.append(path)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield path
        pending.extend(reversed(folders))


def _without_return(line: bytes, separator: bytes) -> bytes:
    """A line of a file written on Windows ends in a carriage return that is not part of it."""
    return line.removesuffix(b"\r") if separator == b"\n" else line


def _positions(blob: bytes, byte: int) -> npt.NDArray[np.int64]:
    """Where ``byte`` occurs, searched in pieces so that the search takes little memory itself."""
    view = np.frombuffer(blob, dtype=np.uint8)
    found = [
        np.flatnonzero(view[start : start + _CHUNK] == byte) + start
        for start in range(0, len(view), _CHUNK)
    ]
    return np.concatenate(found).astype(np.int64)
