"""Which pictures an evaluation is about, by their contents: a name may come to hold another one."""

from __future__ import annotations

import hashlib
import os

from palette.checkpoint import DIGEST
from palette.data.dataset import UnreadableImages
from palette.data.images import UnreadableImage
from palette.data.masks import is_name
from palette.data.order import Draws
from palette.data.paths import scan
from palette.data.sources import Source
from palette.evaluation.progress import Progress
from palette.metrics.cache import hash_files
from palette.training.distributed import World


def pictures(source: Source, count: int, world: World, progress: Progress) -> str:
    """First digits of the SHA-256 of the first ``count`` pictures, their conditions and labels.

    The same on every process; each reads a share.

    Raises:
        UnreadableImages: one of them cannot be read.
    """
    mine = range(world.rank, count, world.size)
    digests = []
    for done, number in enumerate(mine, 1):
        digests.append(_digest(source, number))
        progress("reading", done, len(mine))
    parts = world.gather(digests)
    whole = hashlib.sha256()
    for number in range(count):
        whole.update(parts[number % world.size][number // world.size])
    return whole.hexdigest()[:DIGEST]


def masks(name: str) -> str | None:
    """First digits of the SHA-256 of the files of a mask that is given by path; else None."""
    if is_name(name) or not os.path.exists(name):
        return None
    found = scan(name) if os.path.isdir(name) else None
    files = [name] if found is None else [found.path(number) for number in range(len(found))]
    return hash_files(files)[:DIGEST]


def _digest(source: Source, number: int) -> bytes:
    try:
        given = source.load(number, Draws(0))
    except UnreadableImage as error:
        raise UnreadableImages(f"{error}; an evaluation takes all pictures or none") from None
    digest = hashlib.sha256()
    for part in given if isinstance(given, tuple) else (given,):
        if isinstance(part, int):
            digest.update(f"class {part}".encode())
        else:
            digest.update(f"{part.mode} {part.size} ".encode())
            digest.update(part.tobytes())
    return digest.digest()
