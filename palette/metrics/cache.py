"""Statistics of reference images, computed once: one .npz file each, found by what it is about.

A file is named by the hash of its key: the pixels' files, the feature network and how pictures were
prepared. It is written under a temporary name and renamed, so it is whole or not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from palette.metrics.networks import Identity
from palette.metrics.statistics import FeatureStatistics

FORMAT = 1  # raise when what is stored, or how features are computed around a network, changes

_CHUNK = 1 << 20
_HEADER = "key"


@dataclasses.dataclass(frozen=True)
class Key:
    """Everything the statistics depend on."""

    data: str
    """Hash of the image files, as :func:`hash_files` gives it."""
    network: Identity
    prepared: str
    """What was done to the pictures after reading, as "as they are"."""
    keep: int
    """Bound on the images kept whole."""
    format: int = FORMAT

    def text(self) -> str:
        """Canonical JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def file(self, folder: Path) -> Path:
        """Where the statistics lie."""
        return folder / f"reference-{hashlib.sha256(self.text().encode()).hexdigest()[:24]}.npz"


def hash_files(paths: Sequence[str], *, workers: int = 4) -> str:
    """SHA-256 over the contents of files, in their order; their names do not matter.

    Raises ValueError that names a file that cannot be read.
    """
    whole = hashlib.sha256()
    with ThreadPoolExecutor(workers) as pool:
        for digest in pool.map(_hash_file, paths):
            whole.update(digest)
    return whole.hexdigest()


def load(folder: Path, key: Key) -> FeatureStatistics | None:
    """The statistics of ``key``; None where there are none. A damaged file gives one warning."""
    path = key.file(folder)
    if not path.exists():
        return None
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = str(arrays[_HEADER])
            if found != key.text():
                raise ValueError(f"it is about something else: {found[:200]}")
            return FeatureStatistics.from_arrays(key.network, key.keep, dict(arrays))
    except Exception as error:  # whatever damaged bytes make zipfile and NumPy raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(f"{path}: damaged, computed again: {reason}", stacklevel=2)
        return None


def store(folder: Path, key: Key, statistics: FeatureStatistics) -> Path:
    """Write the statistics of ``key``. Raises ValueError when the folder cannot be written."""
    path = key.file(folder)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            contents: dict[str, Any] = {_HEADER: np.array(key.text()), **statistics.arrays()}
            np.savez(file, **contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _check_archive(path: Path) -> None:
    """An archive of ours is not compressed, so it cannot claim more than there is."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed archive; ours are not")


def _hash_file(path: str) -> bytes:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return digest.digest()
