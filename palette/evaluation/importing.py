"""Existing folders of samples and truth, laid out as an evaluation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from palette.data import images
from palette.evaluation.layout import EVALUATION, MASKS, NAMES, SAMPLES, TRUTH, Layout, write_json
from palette.evaluation.plan import FORMAT
from palette.evaluation.progress import Progress
from palette.evaluation.scoring import Scoring
from palette.metrics.pairing import PUBLISHED, Input, find_masks, list_both, pair
from palette.training.distributed import World


def bring_in(
    root: Path,
    samples: Path,
    truth: Path,
    masks: Path | None,
    scoring: Scoring,
    world: World,
    progress: Progress,
) -> dict[str, str]:
    """Copy pictures into the folder of an evaluation, losslessly; this process's share of them.

    Returns:
        An input's number, as its files have it, to its name.

    Raises:
        ValueError: as of ``score_folders``, or the folder holds something else.
    """
    inputs = pair(*list_both(samples, truth))
    prefix = PUBLISHED[2] if samples.resolve() == truth.resolve() else ""
    holes = None if masks is None else find_masks(masks, [i.name for i in inputs], prefix=prefix)
    facts = _facts(inputs, samples, truth, masks)

    def prepare() -> None:
        _check(root, facts)
        layout = Layout(root, len(inputs), facts["mark"])
        layout.sweep()
        write_json(root / NAMES, {layout.name(one.number): one.name for one in inputs})
        write_json(root / EVALUATION, {**facts, "scoring": scoring.as_json()})

    world.first_does(prepare)
    layout = Layout(root, len(inputs), facts["mark"])
    mine = inputs[world.rank :: world.size]
    for done, one in enumerate(mine, 1):
        _copy(layout, layout.picture(TRUTH, one.number), one.truth)
        for copy, sample in enumerate(one.samples):
            _copy(layout, layout.sample(one.number, copy), sample.path)
        if holes is not None:
            _copy(layout, layout.picture(MASKS, one.number), holes[one.name])
        progress("copying", done, len(mine))
    world.wait()
    return {layout.name(one.number): one.name for one in inputs}


def _facts(inputs: list[Input], samples: Path, truth: Path, masks: Path | None) -> dict[str, Any]:
    """For ``evaluation.json``."""
    pictures = [[one.name, len(one.samples)] for one in inputs]
    facts: dict[str, Any] = {
        "format": FORMAT,
        "samples": str(samples),
        "truth": str(truth),
        "masks": None if masks is None else str(masks),
        "images": len(inputs),
        "samples_per_input": max(len(one.samples) for one in inputs),
        "pictures": [TRUTH] if masks is None else [TRUTH, MASKS],
        "names_sha256": hashlib.sha256(json.dumps(pictures).encode()).hexdigest(),
    }
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {**facts, "mark": mark}


def _check(root: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError unless the folder is new, or holds what is about to be copied again."""
    try:
        found = json.loads((root / EVALUATION).read_text(encoding="utf-8")).get("mark")
    except FileNotFoundError:
        if (root / SAMPLES).exists():
            raise ValueError(f"{root}: holds something else; choose another --output") from None
        return
    except (OSError, ValueError, AttributeError):
        found = None
    if found != facts["mark"]:
        raise ValueError(f"{root}: holds another evaluation; choose another --output, or remove it")


def _copy(layout: Layout, target: Path, source: str) -> None:
    layout.write(target, images.read(source).convert("RGB"), {"source": Path(source).name})
