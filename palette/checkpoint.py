"""Checkpoints: written whole or not at all, verified before use, and never able to run code.

A checkpoint is a directory ``<run>/checkpoints/step_00000100``:

- ``model.safetensors``, ``ema.safetensors``: raw and averaged weights; ``ema-<name>.safetensors``:
  further averages
- ``trainer.pt``: optimizer and position of the run, tensors and plain types only
- ``config.yaml``: the whole config
- ``meta.json``: step, versions, and size and SHA-256 of the other files and of itself

It is built under a temporary name, every file is flushed to the disk, and one rename makes it
visible; old ones are removed only after that. A finished model is also one file: safetensors with
the config in its metadata (:func:`export`). Both formats find every flipped bit, which neither
safetensors nor ``torch.load`` does.

This is the only file that calls ``torch.load``, and it does so with ``weights_only=True`` always:
falling back to unrestricted pickle when that fails is how programs of the field got their CVEs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palette import _archive, _sealed
from palette._archive import CheckpointError as CheckpointError
from palette._durable import flush, remove, sweep, writing

ALL = ("model", "ema", "trainer")
DIGEST = 12  # digits of a SHA-256 that name the weights in written pictures
_EMA = re.compile(r"ema-.+\.safetensors")
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; parts that were not asked for are empty."""

    path: Path
    config: str  # YAML text, for palette.config.from_yaml
    meta: dict[str, Any]
    model: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of ema-<name> parts
    trainer: dict[str, Any] = field(default_factory=dict)
    digest: str = ""  # first 12 digits of the SHA-256 of the file with the weights, else the ema's
    skipped: tuple[str, ...] = ()  # newer checkpoints passed over by latest(), with the reason

    @property
    def step(self) -> int:
        return int(self.meta.get("step", 0))


@dataclass(frozen=True)
class Weights:
    """What sampling needs of a checkpoint; fields as in :class:`Checkpoint`."""

    state: dict[str, Tensor]
    config: str
    digest: str
    step: int
    skipped: tuple[str, ...]


def save(
    run_dir: str | Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    config_yaml: str,
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``<run_dir>/checkpoints/step_<step>`` atomically and durably; returns its path.

    ``averages`` are further ones by name.

    Raises:
        CheckpointError: the disk is full, read-only or failing. Nothing is left under the final
            name, and older checkpoints are untouched.
    """
    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step_{step:08d}"
    temporary = parent / f".tmp-{os.getpid()}-{final.name}"
    with writing(final, temporary):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        temporary.mkdir()
        save_file(_packed(model), temporary / "model.safetensors")
        save_file(_packed(ema), temporary / "ema.safetensors")
        for name, average in (averages or {}).items():
            save_file(_packed(average), temporary / f"ema-{name}.safetensors")
        with (temporary / "trainer.pt").open("wb") as file:
            torch.save(dict(trainer), file)
        (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
        files = {path.name: _sealed.facts_of(path) for path in sorted(temporary.iterdir())}
        facts = {**(meta or {}), "format": _sealed.FORMAT, "step": step}
        facts |= {"torch": str(torch.__version__), "files": files}
        (temporary / "meta.json").write_bytes(_sealed.seal(facts))
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        if final.exists():
            # Only a run taken up again from an earlier step comes here; its older ones remain.
            remove(final)
        temporary.rename(final)
        flush(parent)
    return final


def steps(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run under their final names, newest first; damaged ones included."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in (Path(run_dir) / "checkpoints").iterdir():
            match = _STEP.fullmatch(path.name)
            if match:
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def latest(run_dir: str | Path, parts: Sequence[str] = ALL, *, whole: bool = False) -> Checkpoint:
    """The newest checkpoint of a run that passes verification; ``skipped`` says what was wrong
    with newer ones.

    Args:
        parts: what to load, as of :func:`load`.
        whole: verify all of its files, not only those that are loaded.

    Raises:
        CheckpointError: the run has none that can be loaded.
    """
    skipped: list[str] = []
    for path in steps(run_dir):
        try:
            found = _load_directory(path, parts, whole=whole)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return replace(found, skipped=tuple(skipped))
    if skipped:
        raise CheckpointError(f"{run_dir}: no checkpoint can be loaded: {'; '.join(skipped)}")
    raise CheckpointError(f"{run_dir}: holds no checkpoint (looked for checkpoints/step_*)")


def load(path: str | Path, parts: Sequence[str] = ALL) -> Checkpoint:
    """Load a run directory (its newest good checkpoint), a checkpoint directory or an exported
    file. Every part that is loaded is verified first.

    Args:
        parts: of ``model``, ``ema``, ``ema-<name>`` and ``trainer``, what to load; ``("ema",)`` is
            enough to sample, and ``trainer`` brings all ``ema-<name>`` along. An exported file has
            only ``ema``.

    Raises:
        CheckpointError: it does not exist, is damaged, or is something else.
    """
    path = Path(path)
    if path.is_dir():
        is_run = (path / "checkpoints").is_dir()
        return latest(path, parts) if is_run else _load_directory(path, parts)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run directory")
    return _load_exported(path)


def open_model(path: str | Path, weights: str = "ema") -> Weights:
    """The weights to sample from, of anything :func:`load` takes.

    Args:
        weights: ``ema`` (averaged), ``raw``, or the name of a further average, which a checkpoint
            directory holds as ``ema-<name>.safetensors``.

    Raises:
        CheckpointError: as :func:`load`; an exported file has no raw weights.
    """
    part = {"ema": "ema", "raw": "model"}.get(weights, f"ema-{weights}")
    found = load(path, (part,))
    state = {"ema": found.ema, "model": found.model}.get(part, found.averages.get(weights, {}))
    if not state:
        raise CheckpointError(f"{path}: holds no {weights} weights")
    return Weights(state, found.config, found.digest, found.step, found.skipped)


def verify(path: str | Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Check a checkpoint directory against its own sizes and SHA-256; returns its meta.

    Args:
        names: file names to check; all when None.

    Raises:
        CheckpointError: naming the file at fault.
    """
    path = Path(path)
    meta = _sealed.read(path / "meta.json")
    for name, facts in meta["files"].items():
        if names is not None and name not in names:
            continue
        try:
            size = (path / name).stat().st_size
            # The size first: it is free, and it is how a cut-off file shows.
            found = _sealed.facts_of(path / name) if size == facts["size"] else {"size": size}
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        if found != facts:
            what = "size" if found["size"] != facts["size"] else "SHA-256"
            raise CheckpointError(
                f"{path / name}: damaged: {what} is {found[what.lower().replace('-', '')]}, "
                f"meta.json says {facts[what.lower().replace('-', '')]}"
            )
    return meta


def prune(run_dir: str | Path, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` (at least 2) checkpoints; returns what was removed.

    A checkpoint that cannot be removed is a warning, not an error: training goes on.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, so that one bad checkpoint is not all; {keep=}")
    removed = []
    for path in steps(run_dir)[keep:]:
        try:
            remove(path)
            removed.append(path)
        except OSError as error:
            warnings.warn(f"{path}: old checkpoint not removed: {error.strerror}", stacklevel=2)
    return removed


def set_aside(run_dir: str | Path, after_step: int) -> list[Path]:
    """Rename checkpoints newer than a step to ``*.aside``, so that a run taken up again from
    that step neither finds nor prunes by them; returns the new names."""
    moved = []
    for path in steps(run_dir):
        if int(path.name[len("step_") :]) > after_step:
            target = path.with_name(f"{path.name}.aside")
            if target.exists():
                remove(target)
            moved.append(path.rename(target))
    return moved


def export(
    path: str | Path, weights: Mapping[str, Tensor], config_yaml: str, meta: Mapping[str, Any]
) -> Path:
    """Write one finished model as one safetensors file with config and meta in its metadata.

    Raises:
        CheckpointError: as :func:`save`; an existing file stays as it was.
    """
    path = Path(path)
    tensors = _packed(weights)
    metadata = {"palette.config": config_yaml, "palette.meta": json.dumps(dict(meta))}
    metadata["palette.sha256"] = _digest(tensors, metadata)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with writing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    return path


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file, errors as CheckpointError."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason}") from None


def load_torch(path: str | Path, *, max_bytes: int = 64 * 2**30) -> Any:
    """Whatever tensors and plain types a ``.pt``/``.pth`` file of any origin holds, on the CPU.

    Nothing in the file is executed. Archives are inspected before they are opened (claimed sizes,
    compression, names, CRC-32), tensors after (none may claim more memory than the file gave it).

    Raises:
        CheckpointError: in one line, for every way in which the file can be bad.
    """
    path = Path(path)
    _archive.inspect_file(path, max_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the unpickler, about storages of old files
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the unpickler lets nearly every type of error through
        raise CheckpointError(f"{path}: {_archive.load_reason(error)}") from None
    _archive.inspect_values(path, value)
    return value


def file_digest(path: str | Path) -> str:
    """The first digits of a file's SHA-256."""
    return str(_sealed.facts_of(Path(path))["sha256"])[:DIGEST]


def _load_directory(path: Path, parts: Sequence[str], *, whole: bool = False) -> Checkpoint:
    weights = {part: f"{part}.safetensors" for part in sorted(parts) if part != "trainer"}
    if "trainer" in parts:  # a run is continued with all of its averages
        listed = _sealed.read(path / "meta.json")["files"]
        weights |= {name.removesuffix(".safetensors"): name for name in listed if _EMA.match(name)}
    names = [*weights.values(), "config.yaml", *(["trainer.pt"] if "trainer" in parts else [])]
    meta = verify(path, None if whole else names)
    shown = next(iter(weights.values()), "ema.safetensors")
    missing = sorted({*names, shown} - meta["files"].keys())
    if missing:
        held = ", ".join(meta["files"])
        raise CheckpointError(f"{path}: meta.json lists no {', '.join(missing)}, but {held}")
    loaded = {part: load_safetensors(path / name)[0] for part, name in weights.items()}
    return Checkpoint(
        path=path,
        config=(path / "config.yaml").read_text(encoding="utf-8", errors="replace"),
        meta=meta,
        model=loaded.get("model", {}),
        ema=loaded.get("ema", {}),
        averages={part[4:]: loaded[part] for part in loaded if part.startswith("ema-")},
        trainer=load_torch(path / "trainer.pt") if "trainer" in parts else {},
        digest=str(meta["files"][shown]["sha256"])[:DIGEST],
    )


def _load_exported(path: Path) -> Checkpoint:
    tensors, metadata = load_safetensors(path)
    expected = metadata.pop("palette.sha256", None)
    if expected is None or not {"palette.config", "palette.meta"} <= metadata.keys():
        raise CheckpointError(f"{path}: no palette config in its metadata; convert it first")
    if _digest(tensors, metadata) != expected:
        raise CheckpointError(f"{path}: damaged: its contents do not match their SHA-256")
    try:
        meta = dict(json.loads(metadata["palette.meta"]))
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(
            f"{path}: palette.meta in its metadata is not a JSON object"
        ) from None
    return Checkpoint(
        path=path,
        config=metadata["palette.config"],
        meta=meta,
        ema=tensors,
        digest=file_digest(path),
    )


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous, as safetensors wants them (our weights are channels-last)."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
