"""Shards written one after another, and the journal from which a killed run goes on.

A line of the journal is written when its shard lies whole on the disk under its name, so what the
journal says is there, is there; whatever else a killed run left behind is written again.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from palette._durable import flush, sweep

JOURNAL = ".prepare.jsonl"
LOCK = ".prepare.lock"


@dataclass
class Packed:
    """A shard and the stretch of the input, up to picture number ``until``, that it came from.

    ``left_out`` has the name, kind and reason of each picture that was not taken. ``shard`` is
    empty where no picture of the stretch was taken.
    """

    shard: str = ""
    size: int = 0  # bytes
    pictures: int = 0
    resized: int = 0
    until: int = 0
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    digests: str = ""  # of the pictures, hexadecimal, one after another


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """A folder for shards, made where missing, that no other process packs into meanwhile.

    Raises ValueError when one does already, or where there is a file of that name.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a folder for the shards is wanted")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            # Not flock: workers would inherit that lock, and keep it for one that was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{folder}: another palette prepare writes into it; wait, or choose another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


class Journal:
    """What of a :func:`reserved` folder of shards is done, for the same ``facts`` as before.

    Raises ValueError when the folder holds shards of other settings or pictures, or of something
    else.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._path = folder / JOURNAL
        self.done: list[Packed] = []
        lines = self._lines()
        if not lines and any(folder.glob("*.tar")):
            raise ValueError(f"{folder}: holds .tar files already; an empty folder is wanted")
        if lines and lines[0] != facts:
            other = ", ".join(key for key in facts if lines[0].get(key) != facts[key])
            raise ValueError(
                f"{folder}: holds shards made otherwise ({other}); choose another folder"
            )
        sweep(folder)
        for line in lines[1:]:
            packed = Packed(**line)
            shard = folder / packed.shard
            if packed.shard and not (shard.is_file() and shard.stat().st_size == packed.size):
                break
            self.done.append(packed)
        self._start(facts)

    def add(self, packed: Packed) -> None:
        """Note a shard that lies on the disk."""
        self.done.append(packed)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(packed)) + "\n")
        flush(self._path)

    def _lines(self) -> list[dict[str, Any]]:
        """Whole lines; of the last one a killed run may have written only a part."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        try:
            return [json.loads(line) for line in text.split("\n")[:-1]]
        except ValueError:
            raise ValueError(f"{self._path}: damaged; an empty folder is wanted") from None

    def _start(self, facts: dict[str, Any]) -> None:
        lines = [facts, *(asdict(packed) for packed in self.done)]
        replace(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())


class Shard:
    """A tar archive being written: a picture per sample, the same bytes for the same pictures."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        self._archive: tarfile.TarFile | None = None
        self.packed = Packed()
        self._digests: list[str] = []

    @property
    def payload(self) -> int:
        """Bytes of the archive up to now."""
        return 0 if self._archive is None else self._archive.offset

    def add(self, name: str, data: bytes, digest: bytes, *, resized: bool) -> None:
        """Append a picture."""
        if self._archive is None:
            self._archive = tarfile.open(self._temporary, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        facts = tarfile.TarInfo(name)  # time, owner and the like stay those of nobody
        facts.size = len(data)
        self._archive.addfile(facts, io.BytesIO(data))
        self._digests.append(digest.hex())
        self.packed.pictures += 1
        self.packed.resized += resized

    def close(self, until: int) -> Packed:
        """Bring the archive to its name."""
        if self._archive is not None:
            self._archive.close()
            flush(self._temporary)
            self.packed.size = self._temporary.stat().st_size
            os.replace(self._temporary, self._path)
            flush(self._path.parent)
            self.packed.shard = self._path.name
        self.packed.until = until
        self.packed.digests = "".join(self._digests)
        return self.packed


def replace(path: Path, data: bytes) -> None:
    """Write a file so that its name has the old contents or the new, whole."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_bytes(data)
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)
