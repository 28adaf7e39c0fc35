"""What an evaluation would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from palette import config as configs
from palette.evaluation import paper
from palette.evaluation.plan import Request
from palette.evaluation.presets import PRESETS
from palette.metrics.pairing import list_both, list_files, pair


def evaluation(request: Request, output: Path, scoring: Mapping[str, str | None]) -> str:
    """Everything resolved: the config, what is drawn and scored, and the paper's figures.

    Args:
        request: as it would be run; neither weights nor pictures are looked at.
        output: the folder it would fill.
        scoring: what the command line says of networks, labels and reference.
    """
    sample = request.config.sample
    limit = request.limit or request.config.data.limit
    facts = {
        "checkpoint": request.checkpoint,
        "weights": request.weights,
        "inputs": f"the first {limit}" if limit else "all",
        "samples per input": request.samples_per_input,
        "batch size": request.batch_size,
        "steps": request.steps or sample.steps,
        "solver": request.solver or sample.solver,
        "seed": request.seed,
        **scoring,
        "output": output,
    }
    lines = [configs.to_yaml(request.config)]
    lines += [f"{name}: {value}" for name, value in facts.items() if value is not None]
    task = request.config.task
    table = paper.TABLES[request.table] if request.table else paper.nearest(task.name, vars(task))
    if table is not None:
        method = None if request.preset is None else PRESETS[request.preset].method
        lines += ["", *_figures(table, method)]
    return "\n".join(lines)


def folders(samples: Path, truth: Path, paired: bool) -> str:
    """How many pictures would be scored. Raises ValueError as scoring them does."""
    if not paired:
        return f"{len(list_files(samples))} pictures against {len(list_files(truth))}, as two sets"
    inputs = pair(*list_both(samples, truth))
    return f"{sum(len(one.samples) for one in inputs)} samples of {len(inputs)} inputs"


def _figures(table: paper.Table, method: str | None) -> list[str]:
    rows = []
    for row in table.rows:
        values = ", ".join(f"{name} {value:g}" for name, value in row.columns().items())
        rows.append(f"{'*' if row.method == method else ' '} {row.method}: {values}")
    return [f"{table.title}, {table.images} images", *rows]
