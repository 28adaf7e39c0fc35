"""Generation trained on a folder by epochs: the options of the small DDPM projects as a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palette import config as configs
from palette.build import build_datasets
from palette.config import Config
from palette.data.sources import class_names


@dataclass(frozen=True)
class Plan:
    """What such a training is told.

    Attributes:
        name: of the run ``runs/<name>`` and of the finished model ``<name>.safetensors``.
        images: folder of images, at any depth: class folders are read, and classes ignored but for
            ``classes``.
        timesteps: noise levels of the training grid.
        epochs: times that every image is seen.
        batch_size: images of an optimizer step.
        image_size: side of the square pictures, in pixels.
        schedule: how beta rises, a name of ``schedule.name``.
        classes: each folder in ``images`` is a class, and the model learns to draw it by number.
        pictures: draw samples and their process after every epoch.
        tensorboard: write TensorBoard logs.
    """

    name: str
    images: Path
    timesteps: int = 1000
    epochs: int = 100
    batch_size: int = 64
    image_size: int = 64
    schedule: str = "linear"
    classes: bool = False
    pictures: bool = True
    tensorboard: bool = True

    @property
    def target(self) -> Path:
        """The finished model, in the working directory."""
        return Path(f"{self.name}.safetensors")


def configure(plan: Plan, overrides: Sequence[str] = ()) -> Config:
    """The config of ``plan`` with ``section.option=value`` overrides.

    Learning rate and, at a thousand timesteps, betas are those of Ho et al. 2020 ("Denoising
    Diffusion Probabilistic Models", section 4); other numbers of timesteps end at the same noise,
    as in guided-diffusion. An epoch is as many steps as it takes to see every image.

    Raises:
        ConfigError, ValueError: a name that is none, a finished model of that name, a folder that
            is missing or has no image, a class without one, or an option out of range.
    """
    if Path(plan.name).name != plan.name or plan.name == "..":
        raise ValueError(f"--name: found '{plan.name}', wants a plain name, such as birds")
    if plan.target.exists():
        raise ValueError(f"{plan.target}: exists already; choose another --name, or move it away")
    sections = _sections(plan)
    config = configs.from_sections(sections, overrides=overrides)
    training, _ = build_datasets(config)
    epoch = -(-len(training) // config.data.batch_size)
    sections["train"] |= {
        "steps": plan.epochs * epoch,
        "save_every": epoch,
        "process_every": epoch if plan.pictures else 0,
    }
    return configs.from_sections(sections, overrides=overrides)


def _sections(plan: Plan) -> dict[str, dict[str, Any]]:
    """The config, but for what depends on the number of images."""
    ratio = 1000 / plan.timesteps
    classes = len(class_names(plan.images)) if plan.classes else None
    return {
        "model": {"num_classes": classes},
        "run": {"dir": f"runs/{plan.name}", "tensorboard": plan.tensorboard},
        "schedule": {
            "name": plan.schedule,
            "steps": plan.timesteps,
            "start": min(1e-4 * ratio, 0.999),
            "end": min(0.02 * ratio, 0.999),
        },
        "task": {"name": "generate"},
        "data": {
            "source": "classes" if plan.classes else "folder",
            "path": str(plan.images),
            "image_size": plan.image_size,
            "batch_size": plan.batch_size,
            "validation": 0,
        },
        "train": {"lr": 2e-4, "sample_every": 0},
    }
