"""``meta.json`` of a checkpoint: it seals the other files, and itself."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palette._archive import CheckpointError

FORMAT = 1
_LARGEST = 16 * 2**20  # bytes


def read(path: Path) -> dict[str, Any]:
    """The contents of a ``meta.json``; CheckpointError unless it is whole and makes sense."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST)
    except OSError as error:
        what = "not a checkpoint: it is missing" if error.errno == errno.ENOENT else error.strerror
        raise CheckpointError(f"{path}: {what}") from None
    try:
        meta = json.loads(raw)
        intact = seal({key: value for key, value in meta.items() if key != "sha256"}) == raw
    except (ValueError, RecursionError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: damaged: it does not match its own SHA-256")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {meta.get('format')}; this version reads {FORMAT}")
    files = meta.get("files")
    sound = isinstance(files, dict) and all(
        # A name with a folder in it would make verify() read outside the checkpoint.
        isinstance(facts, dict) and facts.keys() == {"size", "sha256"} and Path(name).name == name
        for name, facts in files.items()
    )
    if not sound or not isinstance(meta.get("step"), int):
        raise CheckpointError(f"{path}: not the meta.json of a checkpoint")
    return dict(meta)


def seal(meta: Mapping[str, Any]) -> bytes:
    """Canonical JSON that ends in its own SHA-256, so that any changed bit shows."""
    body = json.dumps(meta, sort_keys=True)
    sealed = {**json.loads(body), "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def facts_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}
