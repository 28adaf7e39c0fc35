"""``palette test``: restore every picture of a data set, beside the truth.

Writes what the published test phase writes, under its names, but always as lossless PNG.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from palette import _durable, ops
from palette.build import build_datasets
from palette.config import Config
from palette.data import images
from palette.data.dataset import Batch, Batches, TaskDataset, UnreadableImages
from palette.data.loader import Loader
from palette.diffusion.sampler import Sampler
from palette.diffusion.solvers import REGRESSION
from palette.files import unique, write_png
from palette.metrics.pictures import to_uint8
from palette.metrics.scorer import Scorer
from palette.metrics.summary import summarise
from palette.pipeline import Pipeline, load
from palette.upstream import Settings

RESULTS = Path("results") / "test" / "0"
_MASKED = 1.0  # what the picture called Mask_ shows in the hole, as published


def run(
    config: Config,
    published: Settings | None = None,
    checkpoint: str | Path | None = None,
    *,
    weights: str = "ema",
    device: str = "auto",
    steps: int | None = None,
    solver: str | None = None,
) -> dict[str, Any]:
    """Restore the data set of a config: a published one's test set, or what ours holds out.

    Args:
        config: ours, or a published one in our options; results go below its ``run.dir``.
        published: what the published config says beside.
        checkpoint: anything ``palette.load`` opens; by default the published ``resume_state``, or
            the run of ``config``.
        weights: "ema" or "raw".
        device, steps, solver: as for ``palette.load`` and :func:`restore`.

    Raises:
        ValueError, CheckpointError: there is no checkpoint, or it does not fit.
        UnreadableImages: as of :func:`restore`.
    """
    source = checkpoint or (config.run.dir if published is None else published.resume)
    if source is None:
        raise ValueError(
            "path.resume_state: missing; a checkpoint is needed there or on the command line"
        )
    config.data.flip = config.data.shuffle = False
    everything, held_out = build_datasets(config, split=published is None)
    model = load(source, config, weights=weights, device=device)
    return restore(
        model,
        held_out or everything,
        Path(config.run.dir),
        sample_num=8 if published is None else published.sample_num,
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        steps=steps,
        solver=solver,
    )


def restore(
    model: Pipeline,
    dataset: TaskDataset,
    directory: Path,
    *,
    sample_num: int = 8,
    batch_size: int = 8,
    workers: int = 0,
    steps: int | None = None,
    solver: str | None = None,
) -> dict[str, Any]:
    """Sample each entry of ``dataset`` once and write ``GT_``, ``Out_``, ``Process_``, ``Mask_``.

    Args:
        model: for the task of the data set.
        dataset: in a fixed order.
        directory: the run directory; files go to ``results/test/0`` below it.
        sample_num: snapshots of each reverse process in ``Process_``, after its start.
        batch_size, workers: as in training.
        steps, solver: in place of the config's.

    Returns:
        ``mae``, the mean absolute error over all pixels in [-1, 1] as published, ``mae_255`` in
        levels of 255, ``images`` (the ``mae`` of each), how they were made, and under ``metrics``
        all that :mod:`palette.metrics` can say with its built-in networks. It is written as
        ``scores.json`` too, and the metrics as a table to ``scores.txt``.

    Raises:
        UnreadableImages: an entry cannot be read; what was drawn before it stays.
    """
    folder = directory / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    sampler = model.sampler(steps, solver)
    record = model.record(0, steps=steps, solver=solver)
    order = Batches(len(dataset), batch_size, stop=len(dataset))
    names = iter(unique([Path(dataset.source.name(i)).stem for i in range(len(dataset))]))
    errors: dict[str, float] = {}
    scorer = Scorer()
    for batch in Loader(dataset, order, workers=workers):
        for _, reason in batch["skipped"]:  # a stand-in would be scored as if it were the picture
            raise UnreadableImages(f"{reason}; a test takes all pictures or none")
        drawn, frames = _draw(model, sampler, batch, sample_num)
        mae = (drawn - batch["target"]).abs().mean(dim=(1, 2, 3))
        scorer.update(
            to_uint8(drawn),
            torch.arange(len(errors), len(errors) + len(drawn)),
            truth=to_uint8(batch["target"]),
            mask=batch.get("mask"),
        )
        for place, seed in enumerate(batch["seed"].tolist()):
            name = next(names)
            errors[name] = mae[place].item()
            for kind, picture in _pictures(batch, drawn, frames, place):
                write_png(folder / f"{kind}_{name}.png", picture, {**record, "seed": seed})
    total = sum(errors.values()) / len(errors)
    del record["seed"]
    found = summarise(scorer.tally, scorer.networks, names=dict(enumerate(errors)))
    scores = {"mae": total, "mae_255": total * 127.5, **record, "images": errors}
    scores["metrics"] = json.loads(found.to_json(per_image=True))
    _durable.write_text(folder / "scores.txt", found.table())
    _durable.write_text(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    return scores


def _draw(
    model: Pipeline, sampler: Sampler, batch: Batch, sample_num: int
) -> tuple[Tensor, list[Tensor]]:
    """Samples [N, C, H, W], and the start and the snapshots of each, on the CPU."""
    target, mask = batch["target"].to(model.device), batch.get("mask")
    seeds = batch["seed"].to(model.device)
    mask = None if mask is None else mask.to(target)
    initial = torch.zeros_like(target)
    if model.config.model.prediction != REGRESSION:
        initial = ops.noise(seeds, 0, target.shape[1:])
    if mask is not None:
        initial = torch.where(mask.bool(), initial, target)
    frames = [initial.cpu().clone()]
    every = max(sampler.steps // sample_num, 1)

    def keep(step: int, state: Tensor) -> None:
        if (sampler.steps - 1 - step) % every == 0:
            frames.append(state.cpu().clone())

    drawn = sampler.sample(
        batch["condition"].to(model.device),
        seeds=seeds,
        channels=target.shape[1],
        known=None if mask is None else target,
        mask=mask,
        label=_on(model, batch, "label"),
        level=_on(model, batch, "level"),
        initial=initial,
        on_step=keep,
        preview="state",
        progress=True,
    )
    return drawn.cpu(), frames


def _on(model: Pipeline, batch: Batch, key: str) -> Tensor | None:
    value: Tensor | None = batch.get(key)
    return None if value is None else value.to(model.device)


def _pictures(
    batch: Batch, drawn: Tensor, frames: list[Tensor], place: int
) -> Iterator[tuple[str, PILImage.Image]]:
    target = batch["target"][place]
    yield "GT", images.to_image(target)
    yield "Out", images.to_image(drawn[place])
    yield "Process", _grid([frame[place] for frame in frames])
    if "mask" in batch:
        mask = batch["mask"][place].bool()
        yield "Mask", images.to_image(torch.where(mask, _MASKED, target))


def _grid(frames: list[Tensor], gap: int = 2) -> PILImage.Image:
    """Frames [C, H, W] row by row, as many in a row as makes the published grid."""
    across = math.isqrt(len(frames))
    _, height, width = frames[0].shape
    rows = -(-len(frames) // across)
    size = (across * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = PILImage.new("RGB", size)
    for number, frame in enumerate(frames):
        row, column = divmod(number, across)
        corner = (gap + column * (width + gap), gap + row * (height + gap))
        sheet.paste(images.to_image(frame).convert("RGB"), corner)
    return sheet
