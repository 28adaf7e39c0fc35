"""Where a run begins: at nothing, or at a checkpoint."""

from __future__ import annotations

from pathlib import Path

from palette import checkpoint as checkpoints
from palette import config as configs
from palette.checkpoint import Checkpoint
from palette.config import Config, ConfigError
from palette.training.distributed import World
from palette.training.logging import METRICS


class RunExists(ConfigError):  # noqa: N818 - it says what is the matter
    """The run directory holds a run, and nobody said that it should be continued."""


def find(config: Config, resume: str | None, world: World) -> Checkpoint | None:
    """The checkpoint to continue from; None to start anew.

    Checkpoints of the run that are newer than the one found are set aside.

    Args:
        resume: None, ``auto`` (the newest good checkpoint of ``run.dir``; anew where it has none)
            or the path of a checkpoint or run.

    Raises:
        RunExists: ``run.dir`` is in use and ``resume`` does not continue it.
        CheckpointError: there are checkpoints, and none can be loaded.
        ConfigError: the config changes what the checkpoint's model is.
    """
    run_dir = Path(config.run.dir)
    source = world.from_first(_source(run_dir, resume) if world.is_first else None)
    if source is None:
        return None
    found = checkpoints.load(source) if world.is_first else None
    path = world.from_first(found.path if found else None)
    found = found or checkpoints.load(path)
    if not found.trainer:
        raise ConfigError(
            f"--resume {resume}: {path} has only weights; training needs a checkpoint"
        )
    saved = configs.from_yaml(found.config, origin=f"{path}/config.yaml")
    changed = configs.fixed_differences(saved, config)
    if changed:
        raise ConfigError(f"{path}: cannot be continued with another {'; '.join(changed)}")
    if world.is_first and path.parent.parent.resolve() == run_dir.resolve():
        checkpoints.set_aside(run_dir, found.step)
    return found


def _source(run_dir: Path, resume: str | None) -> Path | None:
    holds = bool(checkpoints.steps(run_dir))
    if resume == "auto":
        # A run killed before its first checkpoint starts anew and rewrites its metrics.
        return run_dir if holds else None
    source = None if resume is None else Path(resume)
    continues = source is not None and source.resolve().is_relative_to(run_dir.resolve())
    if (holds or (run_dir / METRICS).exists()) and not continues:
        raise RunExists(
            f"{run_dir}: holds a run already; continue it with --resume auto, "
            f"or choose another run.dir"
        )
    return source
