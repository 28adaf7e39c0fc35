"""The paper's figures for what was evaluated, and every difference between its protocol and ours.

What a list of pictures holds nobody can tell: one named as the paper's is taken for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palette.config import Config
from palette.evaluation import paper
from palette.evaluation.layout import MASKS
from palette.evaluation.plan import Plan
from palette.evaluation.scoring import Scoring

LISTS = {paper.CTEST10K: "ctest10k", paper.PLACES10K: "places10k", paper.FIRST5K: "val5k"}
"""What the names of files that list these pictures contain."""

SIDE = 256  # pixels; what the paper trains and scores at
STEPS, SOLVER = 1000, "ddpm"
_STEPS_TRAINED, _BATCH = 1_000_000, 1024
_WIDTH = (256, [1, 1, 2, 2, 4, 4], 2, [32, 16, 8], "global")  # of the 552M-parameter network


def beside_the_paper(
    table: paper.Table | None, plan: Plan, config: Config, scoring: Scoring
) -> dict[str, Any] | None:
    """The ``paper`` entry of ``scores.json``.

    Returns:
        ``table``, ``setting``, ``data``, ``images``, ``note``, ``rows`` (method and values) and
        ``differences``: a list of what differs, each with ``what``, ``here`` and ``paper``. None
        where the paper has no figures of the task.
    """
    if table is None:
        return None
    return {
        "table": table.number,
        "setting": table.setting,
        "data": table.data,
        "images": table.images,
        "note": table.note,
        "rows": [{"method": row.method, "values": dict(row.values)} for row in table.rows],
        "differences": [
            {"what": what, "here": str(here), "paper": str(theirs)}
            for what, here, theirs in _facts(table, plan, config, scoring)
            if str(here) != str(theirs)
        ],
    }


def _facts(
    table: paper.Table, plan: Plan, config: Config, scoring: Scoring
) -> list[tuple[str, object, object]]:
    """What, here, and in the paper; equal where nothing is to be said."""
    return [
        ("task", plan.task, table.task),
        ("setting", _setting(plan, table), table.setting),
        ("data", table.data if _is_list_of(table, plan) else _data(plan), table.data),
        ("images", plan.images, table.images or plan.images),
        ("image size", "x".join(map(str, plan.image_size)), f"{SIDE}x{SIDE}"),
        ("samples per input", plan.samples_per_input, 1),
        ("steps", plan.steps, STEPS),
        ("solver", plan.solver, SOLVER),
        ("noise levels of sampling", _grid(plan, config), "linear 0.0001 to 0.09"),
        ("training", _training(config), _training_of(table, config)),
        ("network", _network(config), "256 channels, 552M parameters"),
        *_scored(table, scoring),
    ]


def _scored(table: paper.Table, scoring: Scoring) -> list[tuple[str, object, object]]:
    networks = scoring.networks
    whole = "36,500 of Places2" if table.data == paper.PLACES10K else "50,000 of ImageNet"
    given = scoring.reference
    reference = "the truth" if given is None else f"{given} (is it the whole validation set?)"
    classifier = networks.classifier
    inception = networks.extractor.identity
    right = inception.name.startswith(("inception-2015-12-05", "torch-fidelity"))
    theirs = "InceptionV3 for FID and IS, InceptionV1 pool_3 for PD"
    facts: list[tuple[str, object, object]] = [
        ("reference of FID", reference, f"whole validation set, {whole}"),
        ("feature network", f"{inception}, for PD too" if right else inception, theirs),
    ]
    if any("ca" in row.values for row in table.rows):
        facts.append(
            (
                "classifier",
                "none" if classifier is None else classifier.identity,
                "ResNet-50 (text) or EfficientNet-B0 (appendix C.5)",
            )
        )
    if any("lpips" in row.values for row in table.rows):
        facts.append(("LPIPS network", networks.perceptual.identity, "not stated"))
    return facts


def _data(plan: Plan) -> str:
    where = Path(plan.data["path"]).name
    held = ", held out of training" if plan.data["held_out"] else ""
    return f"{plan.data['source']}{f' {where}' if where else ''}{held}"


def _is_list_of(table: paper.Table, plan: Plan) -> bool:
    """Whether the pictures come from the paper's list, by its name."""
    name = LISTS.get(table.data)
    if name is None or plan.data["source"] != "list":
        return False
    return name in Path(plan.data["path"]).name


def _setting(plan: Plan, table: paper.Table) -> str:
    if "quality" in plan.task_options and plan.task == "restore_jpeg":
        quality = plan.task_options["quality"]
        return "JPEG quality drawn from 5 to 30" if quality is None else f"JPEG quality {quality}"
    if MASKS not in plan.pictures:
        return table.setting
    known = {"right": "right half"}
    known |= {mask: paper.TABLES[key].setting for mask, key in paper.MASKS.items()}
    if plan.image_size != (SIDE, SIDE):
        del known["center"]
    mask = plan.task_options["mask"]
    words = known.get(mask, f"mask {mask}")
    return table.setting if words in table.setting or table.number in ("T5", "T6") else words


def _grid(plan: Plan, config: Config) -> str:
    if plan.grid != "published":
        return "uniform in log-SNR, within those trained on"
    return f"{config.schedule.name} {config.sample.start:g} to {config.sample.end:g}"


def _training(config: Config) -> str:
    train = config.train
    return f"{train.steps} steps, batch {config.data.batch_size}, {train.loss.upper()}"


def _training_of(table: paper.Table, config: Config) -> str:
    steps, batch = (500_000, 512) if table.number == "T5" else (_STEPS_TRAINED, _BATCH)
    both = table.number in ("T6", "T8")  # which have a row for each loss
    return f"{steps} steps, batch {batch}, {config.train.loss.upper() if both else 'L2'}"


def _network(config: Config) -> str:
    model = config.model
    if (
        model.channels,
        model.channel_mults,
        model.res_blocks,
        model.attention_resolutions,
        model.attention,
    ) == _WIDTH:
        return "256 channels, 552M parameters"
    return (
        f"{model.kind}, {model.channels} channels, widths {model.channel_mults}, "
        f"{model.res_blocks} residual blocks a level, "
        f"attention ({model.attention}) at {model.attention_resolutions}"
    )
