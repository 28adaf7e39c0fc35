"""Writing so that a name appears only with its whole contents, on the disk and not in a cache."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from palette._archive import CheckpointError

_TEMPORARY = re.compile(r"\.tmp-(\d+)-.+")  # the process that writes it, and its final name


@contextlib.contextmanager
def writing(final: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        free = free_bytes(final)
        with contextlib.suppress(OSError):
            remove(temporary)
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise
        # Where a write fails, torch.save ends in a complaint about positions instead.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        lines = str(getattr(first, "strerror", None) or first).splitlines()
        raise CheckpointError(
            f"{final}: cannot be written: {lines[0] if lines else type(first).__name__} "
            f"({free}); earlier checkpoints are untouched"
        ) from error


def free_bytes(path: Path) -> str:
    for parent in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(parent).free} bytes free"
    return "free space unknown"


def sweep(parent: Path) -> None:
    """Remove what killed processes left under temporary names, and nothing else of such a name."""
    for path in parent.glob(".tmp-*"):
        name = _TEMPORARY.fullmatch(path.name)
        if name and not _writes(int(name[1])):
            with contextlib.suppress(OSError):
                remove(path)


def _writes(process: int) -> bool:
    """Whether another process of this number lives; our own has nothing begun when it sweeps."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or directory; a directory leaves its final name first, in one step."""
    if path.is_dir():
        if not path.name.startswith(".tmp-"):
            path = path.rename(path.with_name(f".tmp-{os.getpid()}-old-{path.name}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when it is whole; a power cut may still take it."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
