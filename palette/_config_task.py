"""Every option of the tasks; see ``palette.config``."""

# ruff: noqa: RUF009 - option() returns a dataclasses.field, which is what RUF009 asks for

from __future__ import annotations

import dataclasses

from palette._config_option import option
from palette._config_text import ConfigError


def _tasks() -> list[str]:
    from palette.data.tasks import TASKS  # when asked: a program may register its own

    return sorted(TASKS)


def _parts() -> list[str]:
    """Tasks that a mixture can be made of: they have a condition, and make it themselves."""
    return [name for name in _tasks() if name not in ("generate", "mixture", "paired")]


def _masks() -> list[str]:
    from palette.data.masks import MASKS

    return ["auto", *MASKS]


@dataclasses.dataclass
class Task:
    name: str = option("inpaint", "what the model learns to do", known=_tasks, fixed=True)
    mask: str = option(
        "auto",
        "hole in training, a path of masks, or LEFT,TOP,RIGHT,BOTTOM in shares; "
        "auto: hybrid, or to uncrop as in the paper",
        known=_masks,
        paths=True,
    )
    quality: int | None = option(
        None, "of restore_jpeg; null: drawn from 5 to 30 as in the paper", low=1, high=100
    )
    factor: float = option(4.0, "of upscale: size of the picture over that of the input", above=1)
    augmentation: float = option(
        0.5,
        "of upscale: most noise in the input, as share of variance; 0: none, nor a level told",
        low=0,
        below=1,
        fixed=True,
    )
    tasks: list[str] = option(
        ["inpaint", "colorize", "restore_jpeg"], "of mixture", known=_parts, fixed=True
    )
    weights: list[float] = option(
        [], "of mixture: how often each task comes, relatively; empty: equally", low=0, empty=True
    )
    fresh: bool = option(
        True, "draw hole, quality and the like anew in each epoch; false: fixed for each picture"
    )


def check_task(task: Task, kind: str, origin: str) -> None:
    """What the options of the task want of each other and of the network, ``model.kind``.

    Raises ConfigError.
    """
    mixed = task.name == "mixture"
    if mixed and len(set(task.tasks)) < len(task.tasks):
        raise ConfigError(f"{origin}: task.tasks must be different tasks; got {task.tasks}")
    if mixed and task.weights and (len(task.weights) != len(task.tasks) or not any(task.weights)):
        raise ConfigError(
            f"{origin}: task.weights must be one number for each of {len(task.tasks)} task.tasks, "
            f"not all 0; got {task.weights}"
        )
    upscales = "upscale" in (task.tasks if mixed else [task.name])
    if upscales and task.augmentation and kind != "unet":
        raise ConfigError(f"{origin}: task.augmentation must be 0 with model.kind=sr3")
