"""What is checked around ``torch.load`` when a file may come from anybody.

``weights_only=True`` keeps a pickle from running code. It does not keep an archive from claiming
ten terabytes, or a tensor from expanding a few bytes to any shape; that is looked after here.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_ENTRIES = 200_000
MAX_PICKLE_BYTES = 256 * 2**20
SMALL_EXPANSION = 2**20  # bytes; stride-0 tensors up to this size occur in honest files


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written. Always one line: path, reason, what to do."""


def inspect_file(path: Path, max_bytes: int) -> None:
    """Refuse by size, kind and table of contents, before anything is unpacked."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if facts.st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if facts.st_size > max_bytes:
        raise CheckpointError(f"{path}: {facts.st_size} bytes; the limit is {max_bytes}")
    # torch decides by these four bytes; zipfile.is_zipfile looks at the end of the file instead.
    if start == b"PK\x03\x04":
        _inspect_zip(path, facts.st_size)
    elif facts.st_size > MAX_PICKLE_BYTES and start[:1] != b"\x80":
        raise CheckpointError(f"{path}: neither a zip archive nor a pickle")


def _inspect_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _inspect_entries(path, entries, size)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged or cut off: {error}") from None
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: entry {damaged!r} does not match its CRC-32")


def _inspect_entries(path: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{path}: {len(entries)} entries; the limit is {MAX_ENTRIES}")
    names = {entry.filename for entry in entries}
    if len(names) != len(entries):
        raise CheckpointError(f"{path}: two entries have the same name")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(f"{path}: a TorchScript program; only plain weights are read")
    for entry in entries:
        parts = re.split(r"[/\\]", entry.filename)
        if ".." in parts or re.match(r"[/\\]|[A-Za-z]:", entry.filename):
            raise CheckpointError(f"{path}: entry {entry.filename!r} leaves the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise CheckpointError(
                f"{path}: entry {entry.filename!r} is compressed; torch.save never does that"
            )
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: entry {entry.filename!r} claims {entry.file_size} bytes of pickle"
            )
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        raise CheckpointError(f"{path}: entries claim {claimed} bytes, the file has {size}")


def inspect_values(path: Path, value: Any) -> None:
    """Refuse tensors that are larger than the memory behind them, or not plain at all."""
    waiting = [value]
    seen: set[int] = set()  # a pickle may hold one list a billion times over, or itself
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Tensor):
            _inspect_tensor(path, current)
        elif isinstance(current, dict):
            waiting += [*current.keys(), *current.values()]
        elif isinstance(current, (list, tuple, set)):
            waiting += list(current)


def _inspect_tensor(path: Path, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        kind = f"{tensor.layout}, {tensor.device.type}"
        raise CheckpointError(f"{path}: a tensor that is not dense on the CPU ({kind})")
    claimed = tensor.numel() * tensor.element_size()
    if claimed > max(tensor.untyped_storage().nbytes(), SMALL_EXPANSION):
        raise CheckpointError(
            f"{path}: a tensor of shape {list(tensor.shape)} claims {claimed} bytes, "
            f"the file holds {tensor.untyped_storage().nbytes()} of it"
        )


def load_reason(error: BaseException) -> str:
    """One line for whatever ``torch.load`` raised."""
    text = str(error)
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted:
        return (
            f"refers to {wanted[1]}, which plain weights do not need; not loaded, nothing was run"
        )
    if isinstance(error, EOFError):
        return "the file is cut off"
    if "legacy .tar" in text:
        return "the tar format of torch before 0.4; save it again with a newer torch"
    # What is left when the advice to switch the protection off is left out.
    text = text.rpartition("WeightsUnpickler error:")[2]
    advice = re.compile(r"\s*(Weights only load failed|Check the documentation|\(\d\) |$)")
    lines = [line.strip() for line in text.splitlines() if not advice.match(line)]
    reason = lines[0][:200] if lines else "no reason given"
    kind = "" if type(error).__name__ == "UnpicklingError" else f"{type(error).__name__} "
    return f"not a loadable file of tensors and plain values: {kind}{reason}"
