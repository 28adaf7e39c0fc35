"""Quality against network evaluations: a trained inpainting run on crops it never trained on.

    python benchmarks/quality.py RUN [--output DIR] [--crops N] [--draws N]

Every solver at several numbers of evaluations, and step caching (``sample.reuse``) beside them,
fill the holes of the same held-out crops from the same seeds. The reference is ancestral sampling
on the published grid. Each row is kept as soon as it is drawn: killed and called again, the script
goes on. It writes ``quality.json``, ``quality.md``, the curves as ``quality.png`` and some of the
filled crops as ``quality_samples.png``. The columns:

evaluations   network evaluations a picture
cost          the same in whole evaluations, by FLOPs: those that reuse deep features count less
error         mean absolute error in the hole, levels of 255, of one sample against the truth
more          by how much that is more than the reference's, and the standard error of this
              difference over the crops
kid, fid      distances of the features of all filled crops from those of the true crops. The
              feature network is named below the table; none is downloaded, and with the built-in
              one the names end in ``_random``. They compare with nothing but other rows: FID grows
              as crops become fewer, and KID lies lower, even below 0, since each filled crop shares
              its known pixels with a true one
apart, from   mean absolute difference in the hole from another row's picture of the same seed,
              levels of 255: of a solver without noise from ``unipc`` with the most evaluations,
              since all of them follow the same curve from the same noise; of step caching from the
              same without; of the shortened published grid from the whole one
ms            measured, for each picture; worth little beside other work

``ddpm`` on the grid "trained" is the published grid without the levels below the range of gamma
that the run was trained on, from the noise that these steps add up to where the network's answers
are left out of them: what differs is the work of the network there, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palette import ops, pipeline
from palette._durable import write_text
from palette.build import build_datasets
from palette.data.dataset import collate
from palette.data.images import to_image
from palette.diffusion.sampler import Sampler
from palette.diffusion.schedule import Array, Schedule, published, spaced
from palette.info import machine
from palette.metrics.frechet import Gaussian, frechet_distance
from palette.metrics.kernel import kernel_distance
from palette.metrics.pictures import to_uint8
from palette.metrics.random_network import RandomNetwork
from palette.ops import philox
from palette.pipeline import Pipeline
from palette.training.cost import count_flops

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
NOISY = ("ddpm", "dpmpp_2m_sde")
EVALUATIONS = (5, 10, 15, 20, 25, 50, 100)
CACHED = (25, 50)  # evaluations at which step caching is measured, of dpmpp_2m
NEXT_DRAW = 1 << 32  # between seeds of one crop, as ``palette evaluate`` has it


@dataclass(frozen=True)
class Row:
    """One way to draw the pictures."""

    solver: str
    evaluations: int
    reuse: int = 1
    grid: str = "log_snr"

    @property
    def name(self) -> str:
        grid = "" if self.grid == "log_snr" else f"-{self.grid}"
        return f"{self.solver}-{self.evaluations}{grid}" + f"-reuse{self.reuse}" * (self.reuse > 1)


SHOWN = tuple(Row(solver, 25) for solver in ("dpmpp_2m_sde", "dpmpp_2m", "ddpm"))


class Crops(NamedTuple):
    """What is filled: target [N, 3, H, W] in [-1, 1], mask [N, 1, H, W], seeds int64 [N]."""

    target: Tensor
    mask: Tensor
    seeds: Tensor


class Grids:
    """Noise levels by their name: even in log-SNR, the published ones, those trained on."""

    def __init__(self, trained: Schedule, published_steps: int) -> None:
        self._trained = trained
        inference = Schedule.from_name("linear", published_steps, 1e-4, 0.09)
        self.published = published(inference)
        self.inside = published(inference, lowest=trained.range[0])
        self.dead = len(self.published) - len(self.inside)

    def levels(self, row: Row) -> Array:
        if row.grid == "log_snr":
            return spaced(self._trained, row.evaluations)
        return self.published if row.grid == "published" else self.inside

    def rows(self) -> list[Row]:
        steps = len(self.published) - 1
        return [Row("ddpm", steps, 1, "published"), Row("ddpm", steps - self.dead, 1, "trained")]


def make_rows(grids: Grids, evaluations: Sequence[int], reuse: Sequence[int]) -> list[Row]:
    """The reference first."""
    solvers = [Row(solver, count) for solver in SOLVERS for count in evaluations]
    cached = [
        Row("dpmpp_2m", count, interval)
        for count in evaluations
        if count in CACHED
        for interval in reuse
    ]
    return [*grids.rows(), *solvers, *cached]


def held_out(model: Pipeline, count: int, draws: int) -> Crops:
    """``count`` crops, ``draws`` times each, every one with a seed of its own."""
    config = model.config
    if count < 2 or draws < 1:
        raise ValueError(f"--crops {count} --draws {draws}: wants at least 2 crops and 1 draw")
    if config.task.name != "inpaint" or config.model.num_classes is not None:
        raise ValueError(f"{model.name}: wants a run of task.name=inpaint without classes")
    _, dataset = build_datasets(config)
    held = 0 if dataset is None else len(dataset)
    if dataset is None or count > held:
        raise ValueError(f"--crops {count}: wants at most the {held} that the run held out")
    batch = collate(dataset.__getitems__([(0, index) for index in range(count)]))
    seeds = torch.arange(count).repeat(draws)
    seeds += NEXT_DRAW * torch.arange(draws).repeat_interleave(count)
    target, mask = batch["target"], batch["mask"].float()
    return Crops(target.repeat(draws, 1, 1, 1), mask.repeat(draws, 1, 1, 1), seeds)


def draw(model: Pipeline, row: Row, grids: Grids, crops: Crops, batch: int) -> Tensor:
    """The crops filled in: [N, 3, H, W] float32 in [-1, 1]."""
    sampler = Sampler(
        model.sampler().network,
        grids.levels(row),
        solver=row.solver,
        prediction=model.config.model.prediction,
        reuse=row.reuse,
        dtype=model.dtype,
    )
    filled = []
    for start in range(0, len(crops.seeds), batch):
        part = Crops(*(each[start : start + batch].to(model.device) for each in crops))
        target, mask, seeds = part
        known = torch.where(mask.bool(), 0.0, target)
        condition = known + mask * ops.noise(seeds, 0, target.shape[1:], stream=philox.CONDITION)
        given = _noise_of_the_rest(grids, part) if row.grid == "trained" else {}
        filled.append(sampler.sample(condition, seeds=seeds, known=known, mask=mask, **given).cpu())
    return torch.cat(filled)


def _noise_of_the_rest(grids: Grids, crops: Crops) -> dict[str, Any]:
    """Where steps below the trained range lead without the network, and the noise after them."""
    shape = crops.target.shape[1:]
    walk = Sampler(torch.zeros_like, grids.published, solver="ddpm").table
    state = ops.noise(crops.seeds, 0, shape)
    for step, (_, _, _, decay, _, sigma) in enumerate(walk[: grids.dead].tolist(), start=1):
        state = decay * state + sigma * ops.noise(crops.seeds, step, shape)
    initial = torch.where(crops.mask.bool(), state, crops.target)
    steps = range(grids.dead + 1, len(grids.published))
    return {"initial": initial, "noises": [ops.noise(crops.seeds, i, shape) for i in steps]}


def drawn(
    folder: Path, rows: Sequence[Row], model: Pipeline, grids: Grids, crops: Crops, batch: int
) -> dict[Row, tuple[Tensor, float]]:
    """Pictures of every row and the seconds they took, from ``folder`` where they lie already."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, row in enumerate(rows, start=1):
        path = folder / f"{row.name}.npz"
        if not path.exists():
            print(f"{number}/{len(rows)} {row.name} …", flush=True)
            start = time.perf_counter()
            pictures = draw(model, row, grids, crops, batch)
            temporary = folder / ".tmp.npz"
            np.savez(temporary, pictures=pictures, seconds=time.perf_counter() - start)
            temporary.replace(path)
        with np.load(path) as kept:
            found[row] = (torch.from_numpy(kept["pictures"]), float(kept["seconds"]))
    return found


def in_hole(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference in the hole of each picture, levels of 255; float64 [N]."""
    hole = mask.expand_as(first).double()
    apart = (first - second).double().abs() * hole
    return apart.sum((1, 2, 3)) / hole.sum((1, 2, 3)) * 127.5


def shallow_share(model: Pipeline) -> float | None:
    """FLOPs of an evaluation that reuses deep features over those of a whole one; None: cannot."""
    network: Any = model.network
    if not hasattr(network, "shallow"):
        return None
    size = model.config.data.image_size
    side = (size, size) if isinstance(size, int) else tuple(size)
    x = torch.zeros(1, 6, *side, device=model.device)
    with torch.no_grad():
        row = network.embed(torch.full((1,), 0.5, device=model.device))
        deep = network.whole(x, row)[1]
    shallow = count_flops(lambda: network.shallow(x, row, deep))
    return shallow / count_flops(lambda: network.body(x, row))


class Measures:
    """Scores of pictures of the crops."""

    def __init__(self, crops: Crops, count: int, reference: Tensor, share: float | None) -> None:
        self._crops, self._count, self._share = crops, count, share
        self._network = RandomNetwork()
        self._truth = self._features(crops.target[:count])
        self._reference = in_hole(reference, crops.target, crops.mask)
        self.identity = self._network.identity

    def of(self, row: Row, pictures: Tensor, seconds: float) -> dict[str, Any]:
        """The columns of a row, see above."""
        error = in_hole(pictures, self._crops.target, self._crops.mask)
        more = (error - self._reference).reshape(-1, self._count).mean(0)
        features = self._features(pictures)
        whole = math.ceil(row.evaluations / row.reuse)
        key = self.identity.key
        return {
            **asdict(row),
            "cost": whole + (row.evaluations - whole) * (self._share or 0.0),
            "error": float(error.mean()),
            "more": float(more.mean()),
            "standard_error": float(more.std() / math.sqrt(self._count)),
            key("kid"): kernel_distance(features, self._truth).mean,
            key("fid"): frechet_distance(_gaussian(features), _gaussian(self._truth)),
            "ms": seconds / len(pictures) * 1e3,
        }

    def apart(self, first: Tensor, second: Tensor) -> dict[str, float]:
        """Mean and largest difference of two rows in the hole, levels of 255."""
        mean = float(in_hole(first, second, self._crops.mask).mean())
        return {"apart": mean, "largest": float((first - second).abs().max()) * 127.5}

    def _features(self, pictures: Tensor) -> Tensor:
        return self._network(to_uint8(pictures)).values


def _gaussian(features: Tensor) -> Gaussian:
    gaussian = Gaussian(features.shape[1])
    gaussian.update(features)
    return gaussian


def compared_with(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row whose picture of the same seed should be the same."""
    most = max((each for each in rows if each.solver == "unipc"), key=lambda r: r.evaluations)
    if row.grid == "trained":
        return rows[0]
    if row.reuse > 1:
        return replace(row, reuse=1)
    return None if row.solver in NOISY or row == most else most


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    kid, fid = found["scores"]
    head = ["", "evaluations", "cost", "error", "more", kid, fid, "apart", "from", "ms"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found["rows"]:
        more = f"{row['more']:+.2f} ± {row['standard_error']:.2f}"
        solver = row["solver"] if row["grid"] == "log_snr" else f"{row['solver']}, {row['grid']}"
        cells = [solver + f", reuse {row['reuse']}" * (row["reuse"] > 1)]
        cells += [str(row["evaluations"]), f"{row['cost']:.1f}", f"{row['error']:.2f}", more]
        cells += [f"{row[kid]:.3g}", f"{row[fid]:.3g}"]
        cells += [f"{row['apart']:.3g}", row["from"]] if "from" in row else ["", ""]
        lines.append(f"| {' | '.join([*cells, format(row['ms'], '.0f')])} |")
    return "\n".join(lines)


def text(found: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    dead, plan = found["below_the_trained_range"], found["plan"]
    facts = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return (
        f"{plan['crops']} held-out crops, {plan['draws']} samples of each, {plan['precision']}, "
        f"weights {plan['weights']}; {facts}. Features: {found['features']}.\n\n"
        f"{table(found)}\n\n"
        f"Of {dead['steps']} published steps {dead['left_out']} lie below the trained range. "
        f"Without the network's answers there, pictures of the same noise change in the hole by "
        f"{dead['apart']:.3g} levels of 255 in the mean and {dead['largest']:.3g} at most; "
        f"another sample is {dead['another_sample']:.3g} away.\n"
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Error and kernel distance over the cost: a line a solver, step caching as points."""
    from matplotlib.figure import Figure

    kid, rows = found["scores"][0], found["rows"]
    plain = [row for row in rows if row["grid"] == "log_snr" and row["reuse"] == 1]
    counts = sorted({row["evaluations"] for row in plain})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, key, name in zip(
        figure.subplots(1, 2),
        ("error", kid),
        ("error in the hole, levels of 255", kid),
        strict=True,
    ):
        axes.axhline(rows[0][key], color="grey", linestyle="--", label=rows[0]["name"])
        for solver in SOLVERS:
            line = [row for row in plain if row["solver"] == solver]
            axes.plot([r["cost"] for r in line], [r[key] for r in line], marker=".", label=solver)
        for interval in sorted({row["reuse"] for row in rows} - {1}):
            points = [row for row in rows if row["reuse"] == interval]
            label = f"dpmpp_2m, reuse {interval}"
            axes.plot([r["cost"] for r in points], [r[key] for r in points], "x", label=label)
        axes.set_xscale("log")
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
        axes.set(xlabel="cost, whole evaluations", ylabel=name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def strip(pictures: dict[Row, tuple[Tensor, float]], crops: Crops, path: Path) -> None:
    """Some crops side by side: the truth, the reference, and below it each way of ``SHOWN``."""
    rows = [next(iter(pictures)), *(row for row in SHOWN if row in pictures)]
    step = max(len(crops.seeds) // 12, 1)
    columns = slice(0, 12 * step, step)
    lines = [crops.target[columns], *(pictures[row][0][columns] for row in rows)]
    sheet = torch.cat([torch.cat([*line], dim=2) for line in lines], dim=1)
    to_image(F.interpolate(sheet[None], scale_factor=2.0, mode="nearest")[0]).save(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is written, as plain data."""
    model = pipeline.load(options.run, precision=options.precision)
    crops = held_out(model, options.crops, options.draws)
    grids, share = Grids(model.schedule, options.published), shallow_share(model)
    rows = make_rows(grids, options.evaluations, options.reuse if share else ())
    plan = {
        "weights": model.digest,
        "crops": options.crops,
        "draws": options.draws,
        "batch": options.batch,
        "precision": str(model.dtype).removeprefix("torch."),
        "published_steps": options.published,
    }
    mark = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:12]
    pictures = drawn(options.output / f"rows-{mark}", rows, model, grids, crops, options.batch)
    reference = pictures[rows[0]][0]
    strip(pictures, crops, options.output / "quality_samples.png")
    measures = Measures(crops, options.crops, reference, share)
    scored = []
    for row in rows:
        columns = {"name": row.name, **measures.of(row, *pictures[row])}
        other = compared_with(row, rows)
        if other is not None:
            columns |= measures.apart(pictures[row][0], pictures[other][0])
            columns["from"] = other.name
        scored.append(columns)
    independent = Row("unipc", max(options.evaluations))
    return {
        "machine": machine(),
        "plan": plan,
        "features": str(measures.identity),
        "scores": [measures.identity.key(name) for name in ("kid", "fid")],
        "shallow_share": share,
        "below_the_trained_range": {
            "steps": rows[0].evaluations,
            "left_out": grids.dead,
            **measures.apart(pictures[rows[1]][0], reference),
            "another_sample": measures.apart(pictures[independent][0], reference)["apart"],
        },
        "rows": scored,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory or checkpoint")
    parser.add_argument("--output", type=Path, help="default: RUN/quality")
    parser.add_argument("--crops", type=int, default=24, help="held-out crops")
    parser.add_argument("--draws", type=int, default=1, help="samples of each")
    parser.add_argument("--batch", type=int, default=24, help="pictures filled at once")
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--reuse", type=int, nargs="+", default=(2, 3, 5), help="intervals")
    parser.add_argument("--published", type=int, default=1000, help="steps of the published grid")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args(arguments)
    options.output = options.output or options.run / "quality"
    try:
        found = measure(options)
    except (ValueError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    write_text(options.output / "quality.json", json.dumps(found, indent=1) + "\n")
    write_text(options.output / "quality.md", text(found))
    plot(found, options.output / "quality.png")
    print(text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
