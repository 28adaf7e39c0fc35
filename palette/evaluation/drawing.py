"""Draws the samples of a plan, leaving alone what an earlier run has finished.

The inputs are divided into groups that depend on the plan alone. A group with anything missing is
drawn again as a whole, so every sample comes out of the batch that it would have come out of in a
run that was never interrupted, on whatever process; only what is missing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palette.build import tells_level
from palette.data import images
from palette.data.dataset import Batch, TaskDataset, UnreadableImages, collate
from palette.diffusion.sampler import Sampler
from palette.evaluation.layout import INPUTS, MASKS, TRUTH, Layout
from palette.evaluation.plan import Plan
from palette.evaluation.progress import Progress
from palette.metrics.reading import read_ahead
from palette.pipeline import Pipeline
from palette.training.distributed import World

_ENTRIES = {INPUTS: "condition", TRUTH: "target", MASKS: "mask"}


def draw(
    model: Pipeline,
    dataset: TaskDataset,
    plan: Plan,
    layout: Layout,
    world: World,
    progress: Progress,
) -> None:
    """Draw this process's share of the groups, the next one being read meanwhile.

    Raises:
        UnreadableImages: an input cannot be read; what was drawn before it stays.
    """
    sampler = model.sampler(plan.steps, plan.solver, plan.eta, plan.reuse)
    mine = plan.groups()[world.rank :: world.size]
    total = sum(map(len, mine)) * plan.samples_per_input
    done = 0

    def count(group: range) -> None:
        nonlocal done
        done += len(group) * plan.samples_per_input
        progress("drawing", done, total)

    def unfinished() -> Iterator[range]:
        for group in mine:
            if _is_finished(plan, layout, group):
                count(group)
            else:
                yield group

    def load(group: range) -> tuple[range, Batch]:
        return group, _load(dataset, group)

    for group, batch in read_ahead(load, unfinished(), workers=1, depth=1):
        samples = _sample(model, sampler, plan, batch, group)
        _write(plan, layout, batch, samples, group)
        count(group)


def _is_finished(plan: Plan, layout: Layout, group: range) -> bool:
    copies = range(plan.samples_per_input)
    return all(
        layout.is_sound(path)
        for number in group
        for path in (
            *(layout.picture(folder, number) for folder in plan.pictures),
            *(layout.sample(number, copy) for copy in copies),
        )
    )


def _load(dataset: TaskDataset, group: range) -> Batch:
    batch = collate(dataset.__getitems__([(0, number) for number in group]))
    for _, reason in batch["skipped"]:  # a stand-in would be scored as if it were the picture
        raise UnreadableImages(f"{reason}; an evaluation takes all pictures or none")
    return batch


def _sample(model: Pipeline, sampler: Sampler, plan: Plan, batch: Batch, group: range) -> Tensor:
    """Samples [N * samples_per_input, C, H, W] on the CPU, those of an input side by side."""
    copies = plan.samples_per_input

    def repeated(name: str, default: float | None = None) -> Tensor | None:
        value = batch.get(name)
        if value is None:
            if default is None:
                return None
            value = torch.full((len(group),), default)
        return value.to(model.device).repeat_interleave(copies, dim=0)

    condition, target, mask = (repeated(name) for name in ("condition", "target", "mask"))
    assert condition is not None
    assert target is not None
    return sampler.sample(
        condition,
        seeds=[plan.seed_of(number, copy) for number in group for copy in range(copies)],
        channels=target.shape[1],
        known=None if mask is None else target,
        mask=mask,
        label=repeated("label", model.config.model.num_classes),  # without one: none in particular
        level=repeated("level", 1.0 if tells_level(model.config) else None),
        batch_size=plan.batch_size,
    ).cpu()


def _write(plan: Plan, layout: Layout, batch: Batch, samples: Tensor, group: range) -> None:
    """Write the pictures of a group that are not there yet, the samples last."""
    copies = plan.samples_per_input
    for place, number in enumerate(group):
        for folder in plan.pictures:
            picture = batch[_ENTRIES[folder]][place]
            picture = picture * 2.0 - 1.0 if folder == MASKS else picture
            _put(layout, layout.picture(folder, number), picture, {})
        for copy in range(copies):
            record = {
                "model": plan.checkpoint,
                "weights": plan.digest,
                "seed": plan.seed_of(number, copy),
                "steps": plan.steps,
                "solver": plan.solver,
                **({"eta": plan.eta} if plan.eta else {}),
                **({"reuse": plan.reuse} if plan.reuse > 1 else {}),
                **({"guidance": plan.guidance} if plan.guidance != 1.0 else {}),
            }
            _put(layout, layout.sample(number, copy), samples[place * copies + copy], record)


def _put(layout: Layout, path: Path, picture: Tensor, record: dict[str, Any]) -> None:
    if not layout.is_sound(path):
        layout.write(path, images.to_image(picture), record)
