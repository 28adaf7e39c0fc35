"""Which file of one folder belongs to which of another, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from palette.data.paths import EXTENSIONS, printable, scan

PUBLISHED = ("Out_", "GT_", "Mask_")
"""How the published test writes samples, truth and masks, all into one folder."""

Files = dict[str, str]
"""Name (below the folder, without extension) to path, in order of names."""

Folder = str | os.PathLike[str]

_COPY = re.compile(r"(.+)_(\d+)")
_EXTENSION = re.compile(rf"({'|'.join(map(re.escape, EXTENSIONS))})(-\d+)?$", re.IGNORECASE)


class Sample(NamedTuple):
    """One picture to be scored."""

    number: int
    """Its number among all samples, in order of names."""
    path: str


class Input(NamedTuple):
    """An input, its truth, and the samples drawn for it."""

    number: int
    name: str
    truth: str
    samples: list[Sample]


def list_files(folder: Folder, prefix: str = "") -> Files:
    """The images in a folder, at any depth; only those whose file name starts with ``prefix``.

    Raises ValueError when there are none, or two have the same name but for the extension.
    """
    paths = scan(folder)
    files: Files = {}
    for index in range(len(paths)):
        name = os.path.splitext(paths.name(index))[0]
        head, tail = os.path.split(name)
        if not tail.startswith(prefix):
            continue
        name = os.path.join(head, tail.removeprefix(prefix))
        if name in files:
            first, second = printable(files[name]), printable(paths.path(index))
            raise ValueError(f"{first} and {second}: two images of one name; wanted is one")
        files[name] = paths.path(index)
    if not files:
        raise ValueError(f"{printable(folder)}: no image whose name starts with '{prefix}'")
    return dict(sorted(files.items()))


def list_both(samples: Folder, truth: Folder) -> tuple[Files, Files]:
    """The images of two folders, or of one folder in the published layout (Out_x beside GT_x)."""
    if not _same(samples, truth):
        return list_files(samples), list_files(truth)
    try:
        return list_files(samples, PUBLISHED[0]), list_files(truth, PUBLISHED[1])
    except ValueError:
        raise ValueError(
            f"{printable(samples)}: compared with itself; wanted are two folders, or one that "
            f"holds {PUBLISHED[0]}... and {PUBLISHED[1]}... images"
        ) from None


def pair(samples: Files, truth: Files) -> list[Input]:
    """Every sample with its truth: of the same name, or all as <name>_0, <name>_1, ...

    Raises ValueError when an image on either side has no partner.
    """
    if samples.keys() <= truth.keys():
        origin = {name: name for name in samples}
    else:
        matches = {name: _COPY.fullmatch(name) for name in samples}
        origin = {name: match[1] if match else name for name, match in matches.items()}
        lonely = [name for name in samples if origin[name] not in truth]
        if lonely:
            raise ValueError(_unmatched(lonely, len(samples), "samples", "truth"))
    inputs = {name: Input(number, name, path, []) for number, (name, path) in _count(truth)}
    for number, (name, path) in _count(samples):
        inputs[origin[name]].samples.append(Sample(number, path))
    lonely = [name for name, found in inputs.items() if not found.samples]
    if lonely:
        raise ValueError(_unmatched(lonely, len(truth), "truth", "samples"))
    for found in inputs.values():
        found.samples.sort(key=lambda sample: _number(sample.path))
    return list(inputs.values())


def find_masks(masks: Folder, names: list[str], *, prefix: str = "") -> dict[str, str]:
    """Path of each input's mask: one file for all, or a folder with one of each name.

    Raises ValueError when there is none for a name.
    """
    if not os.path.isdir(masks):
        return dict.fromkeys(names, os.fspath(masks))
    files = list_files(masks, prefix)
    lonely = [name for name in names if name not in files]
    if lonely:
        raise ValueError(_unmatched(lonely, len(names), "truth", f"masks ({printable(masks)})"))
    return {name: files[name] for name in names}


def plain_name(name: str) -> str:
    """A name without the extension of an image, also where the data hold it out again ("-1")."""
    return _EXTENSION.sub("", name)


def class_folders(names: Iterable[str]) -> list[str]:
    """The folders next to images, in order of names: class 0, 1, …, as in ImageNet's layout.

    Raises ValueError for an image that is in no folder.
    """
    folders = set()
    for name in names:
        parts = name.split("/")
        if len(parts) < 2:
            raise ValueError(f"labels: '{name}' is in no class folder (class/image.png)")
        folders.add(parts[-2])
    return sorted(folders)


def labels_of_folders(names: Iterable[str], folders: Sequence[str]) -> dict[str, int]:
    """The class of each image: the place in ``folders`` of the nearest folder that is among them.

    An image without one is left out.
    """
    numbers = {folder: number for number, folder in enumerate(folders)}
    found = {}
    for name in names:
        label = next((part for part in reversed(name.split("/")[:-1]) if part in numbers), None)
        if label is not None:
            found[name] = numbers[label]
    return found


def read_labels(path: Folder) -> dict[str, int]:
    """Classes from a text file of lines "<image name> <class number>", as ImageNet's val.txt.

    Extensions of images are dropped. Raises ValueError that names file and line; so it does for a
    name that was there before.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ValueError(f"{printable(path)}: {reason}") from None
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(
                f"{printable(path)}, line {number}: wanted is '<image name> <class number>'"
            )
        plain = plain_name(name.strip())
        if plain in labels:
            raise ValueError(
                f"{printable(path)}, line {number}: '{plain}' has a class already; wanted is one"
            )
        labels[plain] = int(label)
    return labels


def check_labels(labels: Mapping[str, int], names: list[str]) -> None:
    """Raise ValueError when a name has no label."""
    lonely = [name for name in names if name not in labels]
    if lonely:
        raise ValueError(_unmatched(lonely, len(names), "truth", "labels"))


def _same(first: Folder, second: Folder) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _count(files: Files) -> enumerate[tuple[str, str]]:
    return enumerate(files.items())


def _number(path: str) -> tuple[int, str]:
    match = _COPY.fullmatch(os.path.splitext(os.path.basename(path))[0])
    return (int(match[2]) if match else -1, path)


def _unmatched(lonely: list[str], total: int, side: str, other: str) -> str:
    return (
        f"{side}: {len(lonely)} of {total} images have no partner of the same name in {other}, "
        f"the first is '{lonely[0]}'"
    )
