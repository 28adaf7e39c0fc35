"""What is asked of an evaluation, and the plan that follows: all that decides a pixel."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from palette.build import build_levels, default_eta, image_size
from palette.checkpoint import DIGEST
from palette.config import Config
from palette.data.dataset import TaskDataset
from palette.evaluation import contents
from palette.evaluation.layout import EVALUATION, INPUTS, MASKS, TRUTH
from palette.evaluation.progress import Progress
from palette.pipeline import Pipeline
from palette.training.distributed import World

FORMAT = 2
_COPY_STRIDE = 1 << 32


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate and how to sample; None takes what the config says."""

    checkpoint: str
    config: Config
    split: bool = True
    """False takes all pictures of the data, also where the config holds some out."""
    weights: str = "ema"
    samples_per_input: int = 1
    limit: int | None = None
    """Evaluate the first so many inputs only."""
    batch_size: int = 16
    """Samples that the network evaluates at once."""
    seed: int = 0
    steps: int | None = None
    solver: str | None = None
    precision: str = "auto"
    preset: str | None = None
    table: str | None = None
    """Of the paper's figures: a key of ``paper.TABLES``; None takes the nearest."""
    command: tuple[str, ...] = ()
    """What was typed, for the record."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """An evaluation before it is run. Two plans with equal pixels have equal ``mark``."""

    checkpoint: str
    """What was loaded: a path."""
    digest: str
    """First digits of the SHA-256 of its weights."""
    weights: str
    """"ema", "raw" or the name of a further average."""
    solver: str
    steps: int
    """Network evaluations per sample."""
    eta: float
    guidance: float
    """Weight of the label, of a model with classes."""
    reuse: int
    """Every so many evaluations one is whole; 1: all."""
    grid: str
    """Noise levels: "log_snr" or "published"."""
    levels: str
    """First digits of the SHA-256 of the noise levels themselves."""
    seed: int
    samples_per_input: int
    batch_size: int
    """Samples evaluated together; another number can change the last bit of a network's answer."""
    precision: str
    task: str
    task_options: dict[str, Any]
    """The other options of the config's section ``task``."""
    data: dict[str, Any]
    """source, path, fit, limit, held_out, seed (of crops, masks); pictures and masks: first digits
    of the SHA-256 of what they hold."""
    images: int
    """Number of inputs."""
    image_size: tuple[int, int]
    """Height and width [pixels]."""
    paired: bool = True
    """Whether a sample has something to do with its truth; what is made from nothing has not."""
    pictures: tuple[str, ...] = (INPUTS, TRUTH)
    """Folders that have a picture of every input."""
    preset: str | None = None

    @property
    def mark(self) -> str:
        """Twelve digits that pictures of this plan carry."""
        return hashlib.sha256(json.dumps(self._pixels(), sort_keys=True).encode()).hexdigest()[:12]

    def seed_of(self, number: int, copy: int) -> int:
        """The seed of an input's sample: seed + number + 2^32 copy."""
        return self.seed + number + _COPY_STRIDE * copy

    def groups(self) -> list[range]:
        """Numbers of the inputs that are drawn together, whoever draws them and when."""
        size = max(1, self.batch_size // self.samples_per_input)
        starts = range(0, self.images, size)
        return [range(start, min(start + size, self.images)) for start in starts]

    def as_json(self) -> dict[str, Any]:
        """For ``evaluation.json``."""
        return {"format": FORMAT, **dataclasses.asdict(self), "mark": self.mark}

    def differences(self, root: Path) -> list[str]:
        """What a plan already in the folder has otherwise, as "steps: 25, not 50"; empty if none.

        Raises ValueError when what lies there is no plan.
        """
        path = root / EVALUATION
        if not path.exists():
            return []
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise ValueError(
                f"{path}: not the JSON of an evaluation; choose another --output"
            ) from None
        before, after = _flat(found), _flat(self._pixels())
        return [
            f"{key}: {before.get(key)}, not {value}"
            for key, value in after.items()
            if before.get(key) != value
        ]

    def _pixels(self) -> dict[str, Any]:
        facts = dataclasses.asdict(self)
        # Which weights and which pictures these are, their contents say; both may have moved.
        for name in ("checkpoint", "weights", "preset"):
            del facts[name]
        facts["data"] = {key: value for key, value in self.data.items() if key != "path"}
        return facts


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts within facts by their full names, as they read after a way through JSON."""
    found: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(facts)).items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": each for inner, each in _flat(value).items()}
        else:
            found[key] = value
    return found


def make_plan(
    request: Request,
    model: Pipeline,
    dataset: TaskDataset,
    world: World,
    progress: Progress,
    *,
    held_out: bool = False,
) -> Plan:
    """What a request comes to.

    Args:
        request: what was asked for.
        model: its checkpoint, open.
        dataset: its data, in a fixed order; all that is evaluated is read once.
        world: this process and the others, which get the same plan.
        progress: hears how far it is.
        held_out: whether these were held out of training.

    Raises:
        UnreadableImages: a picture cannot be read.
    """
    config = request.config
    record = model.record(request.seed, steps=request.steps, solver=request.solver)
    images = min(len(dataset), request.limit or len(dataset))
    data, task, first = config.data, dataclasses.asdict(config.task), dataset[(0, 0)]
    pictures = {
        INPUTS: first["condition"].shape[0] in (1, 3),
        TRUTH: True,
        MASKS: "mask" in first,
    }
    return Plan(
        checkpoint=model.name,
        digest=model.digest,
        weights=request.weights,
        solver=record["solver"],
        steps=record["steps"],
        eta=default_eta(config, record["solver"]),
        guidance=config.sample.guidance,
        reuse=config.sample.reuse,
        grid=config.sample.grid if record["steps"] == config.sample.steps else "log_snr",
        levels=_digest_of_levels(config, record["steps"]),
        seed=request.seed,
        samples_per_input=request.samples_per_input,
        batch_size=request.batch_size,
        precision=str(model.dtype).removeprefix("torch."),
        task=config.task.name,
        task_options={key: value for key, value in task.items() if key != "name"},
        data={
            "source": data.source,
            "path": data.path,
            "fit": data.fit,
            "limit": data.limit,
            "held_out": held_out,
            "seed": config.run.seed,
            "pictures": contents.pictures(dataset.source, images, world, progress),
            "masks": contents.masks(config.task.mask),
        },
        images=images,
        image_size=image_size(config),
        paired=len(first["condition"]) > 0,
        pictures=tuple(folder for folder, there in pictures.items() if there),
        preset=request.preset,
    )


def _digest_of_levels(config: Config, steps: int) -> str:
    # In float32, as the network sees them: processors differ in the last bits of float64.
    levels = build_levels(config, steps).astype(np.float32)
    return hashlib.sha256(levels.tobytes()).hexdigest()[:DIGEST]
