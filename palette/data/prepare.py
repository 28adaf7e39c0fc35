"""A folder or list of images checked, resized, filtered and packed into shards.

Any number of processes gives the same bytes: pictures are prepared in parallel, and taken in the
order of the input.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from palette.data import images
from palette.data.packing import Journal, Packed, Shard, replace, reserved
from palette.data.paths import EXTENSIONS, Paths, printable, read_list, scan

REPORT = "report.json"
UNREADABLE, TOO_SMALL, DUPLICATE = "unreadable", "too small", "duplicate"

_JPEG = frozenset((".jpg", ".jpeg", ".jpe", ".jfif"))
_JPEG_QUALITY = 95  # of resized pictures; above it files grow fast and no loss is seen
_DIGEST_BYTES = 16
_CHUNK = 16  # pictures a process gets at a time
_AHEAD = 4  # chunks under way for each process
_LOOKED_INTO, _LOOK = 16, 2**16  # files, and bytes of each, by which a set of pictures is known


@dataclass(frozen=True)
class Settings:
    """What becomes of the pictures.

    ``size``: the shorter side of larger pictures is brought to so many pixels, with antialiasing
    and the aspect kept; None keeps every file as it is. ``min_size``: pictures with a shorter side
    below it are left out. ``keep_duplicates``: also take pictures of which one with the same bytes
    (after resizing) came before. A shard ends before ``shard_bytes`` or after ``shard_pictures``.
    """

    size: int | None = None
    min_size: int = 1
    keep_duplicates: bool = False
    shard_bytes: int | None = 256 * 10**6
    shard_pictures: int | None = None


class _Outcome(NamedTuple):
    """A picture as it goes into a shard, or, with ``fault``, why it does not."""

    data: bytes = b""
    ending: str = ""
    resized: bool = False
    fault: str = ""
    reason: str = ""


def prepare(
    source: str | os.PathLike[str], out: Path, settings: Settings, *, workers: int = 1
) -> dict[str, Any]:
    """Pack the images of a folder or list into ``out``/shard-000000.tar and so on.

    A run that was killed goes on where it stopped when it is called again; the shards are the same.
    ``workers`` processes prepare pictures; with 1 the calling process does. A member is named for
    its folder, number and name: ``folder/000000012-name.jpg``. For finding duplicates about 100
    bytes of memory are taken for each picture.

    Returns:
        the report, also written to ``out``/report.json: pictures, kept, resized, left_out (how many
        for which fault), shards (name, bytes, pictures) and named (name, fault and reason of each
        picture left out).

    Raises:
        ValueError: there is no image, ``out`` holds something else already, or another process
            writes into it.
        UnreadableImage: not one picture could be taken.
    """
    paths = scan(source) if os.path.isdir(source) else read_list(source)
    with reserved(out):
        facts = {**asdict(settings), "pictures": len(paths), "files": _fingerprint(paths)}
        journal = Journal(out, facts)
        _pack(paths, out, settings, journal, workers)
        report = _report(len(paths), journal.done)
        if not report["kept"]:
            first = report["named"][0]["reason"]
            raise images.UnreadableImage(
                f"{source}: none of {len(paths)} images can be used; the first: {first}"
            )
        replace(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _fingerprint(paths: Paths) -> str:
    """Tells these files from others of the same names, by their sizes and a look into a few.

    Times would not survive a copy, and files without compression are all of one size.
    """
    found = hashlib.sha256()
    every = -(-len(paths) // _LOOKED_INTO)
    for index in range(len(paths)):
        found.update(os.fsencode(paths[index]) + b"\0")
        found.update(_look(paths.path(index), 0 if index % every else _LOOK))
    return found.hexdigest()


def _look(path: str, length: int) -> bytes:
    """Size and first bytes of a file; nothing of one that cannot be read."""
    try:
        size = os.stat(path).st_size
        if length == 0 or not os.path.isfile(path):  # a pipe would block
            return f"{size}\0".encode()
        with open(path, "rb") as file:
            return f"{size}\0".encode() + file.read(length)
    except OSError:
        return b""


def _pack(paths: Paths, out: Path, settings: Settings, journal: Journal, workers: int) -> None:
    """Every picture that the journal does not have yet."""
    start = journal.done[-1].until if journal.done else 0
    seen = {digest for packed in journal.done for digest in _digests(packed)}
    number = sum(bool(packed.shard) for packed in journal.done)
    shard = Shard(out / _shard_name(number))
    outcomes = _outcomes(paths, start, settings, workers)
    bar = tqdm(outcomes, total=len(paths), initial=start, unit="image", disable=None)
    for index, outcome in enumerate(bar, start):
        name, digest = paths.name(index), hashlib.sha256(outcome.data).digest()[:_DIGEST_BYTES]
        if not outcome.fault and digest in seen and not settings.keep_duplicates:
            outcome = _Outcome(fault=DUPLICATE, reason=f"{name}: came before")
        if outcome.fault:
            shard.packed.left_out.append((name, outcome.fault, outcome.reason))
            continue
        if _full(shard, len(outcome.data), settings):
            journal.add(shard.close(index))
            number += 1
            shard = Shard(out / _shard_name(number))
        seen.add(digest)
        member = _member(name, index, outcome.ending)
        shard.add(member, outcome.data, digest, resized=outcome.resized)
    if start < len(paths):
        journal.add(shard.close(len(paths)))


def _full(shard: Shard, following: int, settings: Settings) -> bool:
    """Whether a picture of ``following`` bytes must go into the next shard."""
    if not shard.packed.pictures:
        return False
    if settings.shard_pictures is not None:
        return shard.packed.pictures >= settings.shard_pictures
    return settings.shard_bytes is not None and shard.payload + following > settings.shard_bytes


def _outcomes(paths: Paths, start: int, settings: Settings, workers: int) -> Iterator[_Outcome]:
    """Prepared pictures from number ``start`` on, in order."""
    chunks = (
        [paths.path(index) for index in range(first, min(first + _CHUNK, len(paths)))]
        for first in range(start, len(paths), _CHUNK)
    )
    if workers == 1:
        for chunk in chunks:
            yield from _prepare_all(chunk, settings)
        return
    pool = ProcessPoolExecutor(workers, initializer=_follow_parent)
    waiting: deque[Future[list[_Outcome]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_prepare_all, chunk, settings))
            if len(waiting) >= _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare_all(chunk: list[str], settings: Settings) -> list[_Outcome]:
    return [_prepare(path, settings) for path in chunk]


def _prepare(path: str, settings: Settings) -> _Outcome:
    """One picture; what has to be resized is decoded at no less than twice the size."""
    size = settings.size
    least = None if size is None else max(2 * size, settings.min_size)
    try:
        image = images.read(path, at_least=None if least is None else (least, least))
        ending = _ending(path)
        if min(image.size) < settings.min_size:
            found = f"{image.width}x{image.height} pixels"
            return _Outcome(fault=TOO_SMALL, reason=f"{printable(path)}: {found}")
        if size is None or min(image.size) <= size:
            return _Outcome(Path(path).read_bytes(), ending)
    except images.UnreadableImage as error:
        return _Outcome(fault=UNREADABLE, reason=str(error))
    except OSError as error:
        return _Outcome(fault=UNREADABLE, reason=f"{printable(path)}: {error.strerror}")
    kind = "JPEG" if ending in _JPEG else "PNG"
    data = _encoded(_resized(image, size), kind)
    return _Outcome(data, ".jpg" if kind == "JPEG" else ".png", resized=True)


def _ending(path: str) -> str:
    """That of the name; of one that says nothing, such as "x" or "x.0", that of the contents."""
    ending = os.path.splitext(path)[1].lower()
    return ending if ending in EXTENSIONS else images.usual_ending(path)


def _resized(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    wanted = (round(image.height * scale), round(image.width * scale))
    return image.resize((wanted[1], wanted[0]), Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": _JPEG_QUALITY} if kind == "JPEG" else {}))
    return file.getvalue()


def _member(name: str, index: int, ending: str) -> str:
    """Name in the archive; it has no dot but that of its ending, and is no other picture's."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{index:09d}-{path.stem.replace('.', '_')}{ending}"))


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _digests(packed: Packed) -> Iterator[bytes]:
    joined = bytes.fromhex(packed.digests)
    for place in range(0, len(joined), _DIGEST_BYTES):
        yield joined[place : place + _DIGEST_BYTES]


def _report(pictures: int, done: list[Packed]) -> dict[str, Any]:
    left_out = [each for packed in done for each in packed.left_out]
    faults = Counter(fault for _, fault, _ in left_out)
    return {
        "pictures": pictures,
        "kept": sum(packed.pictures for packed in done),
        "resized": sum(packed.resized for packed in done),
        "left_out": {fault: faults[fault] for fault in (UNREADABLE, TOO_SMALL, DUPLICATE)},
        "shards": [
            {"name": packed.shard, "bytes": packed.size, "pictures": packed.pictures}
            for packed in done
            if packed.shard
        ],
        "named": [
            {"name": name, "fault": fault, "reason": reason} for name, fault, reason in left_out
        ],
    }
