"""One evaluation, from a checkpoint or from two folders of pictures to its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palette import checkpoint as checkpoints
from palette import config as configs
from palette import upstream
from palette.build import build_datasets
from palette.config import Config
from palette.data.dataset import TaskDataset
from palette.data.sources import class_names
from palette.evaluation import page, paper
from palette.evaluation.drawing import draw
from palette.evaluation.importing import bring_in
from palette.evaluation.layout import (
    EVALUATION,
    MASKS,
    NAMES,
    REFERENCE,
    SAMPLES,
    TRUTH,
    Layout,
    write_json,
)
from palette.evaluation.plan import Plan, Request, make_plan
from palette.evaluation.progress import Bars
from palette.evaluation.protocol import beside_the_paper
from palette.evaluation.scoring import FOLDERS, Scoring, score, write_scores
from palette.metrics.pairing import class_folders, list_both
from palette.metrics.scores import Scores
from palette.pipeline import load
from palette.training.distributed import World

_SHOWN = 4  # differences named in a message


def read_config(
    checkpoint: str | None, config: str | None, overrides: Sequence[str] = ()
) -> tuple[Config, bool]:
    """The config of an evaluation, and whether a part of its data is held out of training.

    Args:
        checkpoint: whose own config is meant where no other is given; None: the defaults.
        config: of ours, or a published JSON one.
        overrides: ``section.option=value``.

    Raises:
        ConfigError, CheckpointError: in one line.
    """
    if config is not None:
        found, published = upstream.read_run(config, "test", overrides=overrides)
        return found, published is None
    if checkpoint is None:
        return configs.from_sections({}, overrides=overrides), True
    if upstream.is_published(upstream.find_published(checkpoint)):
        raise configs.ConfigError(f"{checkpoint}: -c CONFIG is needed with this checkpoint")
    text = checkpoints.load(checkpoint, ()).config
    return configs.from_yaml(text, origin=f"{checkpoint}: its config", overrides=overrides), True


def evaluate(request: Request, root: Path, scoring: Scoring, world: World) -> Scores:
    """Draw what is missing, score all of it, and write the results; the same on every process.

    Called again after it was killed it goes on where it was, and ends with the same scores to the
    last digit. The input of number i has the seed ``seed + i + 2^32 k`` for its sample k.

    Args:
        request: what to evaluate.
        root: folder of the evaluation, made where missing.
        scoring: with what it is scored.
        world: this process and the others; the inputs are shared out.

    Raises:
        ValueError: the folder holds another evaluation, there are no pictures, or as of
            ``score_folders``.
        CheckpointError: the weights are missing or damaged.
        UnreadableImages: an input cannot be read.
    """
    model = load(
        request.checkpoint,
        _of_model(request),
        weights=request.weights,
        device=world.device,
        precision=request.precision,
    )
    dataset, others = _data(request.config, request.split)
    bars = Bars(active=world.is_first)
    plan = make_plan(request, model, dataset, world, bars, held_out=others is not None)
    if scoring.reference is not None:
        cache, size = scoring.cache or root / REFERENCE, scoring.size or plan.image_size
        scoring = dataclasses.replace(scoring, cache=cache, size=size)
    if scoring.labels == FOLDERS:
        folders = _class_folders(request.config, dataset, others)
        scoring = dataclasses.replace(scoring, folders=folders)
    facts = {"scoring": scoring.as_json(), "command": list(request.command)}
    layout = _begin(plan, dataset, root, facts, world)
    names = {layout.name(i): dataset.source.name(i) for i in range(plan.images)}
    scoring.check(names, paired=plan.paired)
    draw(model, dataset, plan, layout, world, bars)
    world.wait()
    masks = root / MASKS if MASKS in plan.pictures else None
    scores = score(
        root / SAMPLES, root / TRUTH, masks, names, scoring, world, bars, paired=plan.paired
    )
    bars.close()

    def write() -> None:
        nearest = paper.nearest(plan.task, plan.task_options)
        table = paper.TABLES[request.table] if request.table else nearest
        write_scores(root, scores, beside_the_paper(table, plan, request.config, scoring))
        page.write(root)

    world.first_does(write)
    return scores


def score_existing(
    samples: Path,
    truth: Path,
    root: Path | None,
    scoring: Scoring,
    world: World,
    *,
    masks: Path | None = None,
    paired: bool = True,
) -> Scores:
    """Score pictures that are there already.

    Args:
        samples, truth, masks, paired: as of ``score_folders``.
        root: folder of the evaluation, which receives a copy of all pictures; None writes nothing.
        scoring: with what they are scored.
        world: this process and the others; the pictures are shared out.

    Raises:
        ValueError: as of ``score_folders``, or ``root`` holds something else.
    """
    bars = Bars(active=world.is_first)
    if root is None or not paired:
        names = {name: name for name in list_both(samples, truth)[1]} if paired else {}
        return score(samples, truth, masks, names, scoring, world, bars, paired=paired)
    if scoring.reference is not None and scoring.cache is None:
        scoring = dataclasses.replace(scoring, cache=root / REFERENCE)
    names = bring_in(root, samples, truth, masks, scoring, world, bars)
    copied = None if masks is None else root / MASKS
    scores = score(root / SAMPLES, root / TRUTH, copied, names, scoring, world, bars)
    bars.close()

    def write() -> None:
        write_scores(root, scores, None)
        page.write(root)

    world.first_does(write)
    return scores


def _of_model(request: Request) -> Config:
    """The config that the network is built by: a model of several tasks stays one of several."""
    if upstream.is_published(upstream.find_published(request.checkpoint, request.weights)):
        return request.config
    saved = configs.from_yaml(checkpoints.load(request.checkpoint, ()).config)
    return dataclasses.replace(request.config, task=saved.task)


def _data(config: Config, split: bool) -> tuple[TaskDataset, TaskDataset | None]:
    """What is evaluated, in a fixed order, and what it was held out of where it was."""
    plain = dataclasses.replace(config.data, flip=False, shuffle=False)
    everything, held_out = build_datasets(dataclasses.replace(config, data=plain), split=split)
    return (everything, None) if held_out is None else (held_out, everything)


def _class_folders(config: Config, evaluated: TaskDataset, others: TaskDataset | None) -> list[str]:
    """Names of all class folders of the data, in order of their classes."""
    if config.data.source == "classes":
        return class_names(config.data.path)
    sources = [part.source for part in (evaluated, others) if part is not None]
    return class_folders(source.name(i) for source in sources for i in range(len(source)))


def _begin(
    plan: Plan, dataset: TaskDataset, root: Path, facts: dict[str, Any], world: World
) -> Layout:
    """The folder, ready to be filled: new, or with what an earlier run of this plan left."""

    def prepare() -> None:
        found = plan.differences(root)
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(
                f"{root}: holds another evaluation ({'; '.join(found[:_SHOWN])}{more}); "
                "choose another --output, or remove it"
            )
        layout = Layout(root, plan.images, plan.mark)
        layout.sweep()
        names = {layout.name(i): dataset.source.name(i) for i in range(plan.images)}
        write_json(root / NAMES, names)
        write_json(root / EVALUATION, {**plan.as_json(), **facts})

    world.first_does(prepare)
    return Layout(root, plan.images, plan.mark)
