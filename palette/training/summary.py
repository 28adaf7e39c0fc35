"""What a finished run shows: pictures of its samples, and two tables, quality and speed.

Quality is the mean absolute error inside a fixed hole, in levels of 255, on crops never trained on.
The baselines see the same crops: the mean colour of the known pixels, and biharmonic inpainting.
Speed runs the same seeds through plain PyTorch and through the fused ops, side by side.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.restoration import inpaint_biharmonic
from torch import Tensor

from palette.models.unfused import unfuse
from palette.pipeline import Pipeline, load
from palette.training import pictures

_ROUNDS = 3
_TIMED = 16  # crops of the speed table
_PICTURED = 8


def write_summary(directory: Path, pipeline: Pipeline, batch: dict[str, Any], samples: int) -> str:
    """Sample the crops of ``batch`` and write pictures and tables into ``directory``.

    Args:
        directory: the run directory; grid.png, strip.png, process.gif, loss.png, summary.json and
            summary.md are written to it.
        pipeline: the trained model.
        batch: ``target`` [N, C, H, W] in [-1, 1], ``mask`` [N, 1, H, W] and ``seed`` int64 [N].
        samples: samples per crop.

    Returns:
        The two tables as text.
    """
    target, mask, seeds = batch["target"], batch["mask"].float(), batch["seed"]
    draws = torch.stack([pipeline.complete(target, mask, seeds + i).cpu() for i in range(samples)])
    quality = _quality(target, mask, draws)
    speed = _speed(directory, pipeline, target[:_TIMED], mask[:_TIMED], seeds[:_TIMED])
    _draw(directory, pipeline, target, mask, seeds, draws)
    tables = {"quality": quality, "speed": speed}
    (directory / "summary.json").write_text(json.dumps(tables, indent=2))
    text = _tables(quality, speed, crops=len(target), steps=pipeline.config.sample.steps)
    (directory / "summary.md").write_text(text)
    return text


def _quality(target: Tensor, mask: Tensor, draws: Tensor) -> dict[str, float]:
    def error(estimate: Tensor) -> float:
        hole = mask.expand_as(target).double()
        distance = (estimate - target).double().abs() * hole
        return float(distance.sum() / hole.sum() * 127.5)

    return {
        "one sample": error(draws[0]),
        f"mean of {len(draws)} samples": error(draws.mean(dim=0)),
        "mean colour of the known pixels": error(mean_colour(target, mask)),
        "biharmonic inpainting (scikit-image)": error(biharmonic(target, mask)),
    }


def mean_colour(target: Tensor, mask: Tensor) -> Tensor:
    """The mean of the known pixels of each image and channel, spread to [N, C, H, W]."""
    known = 1 - mask
    mean = (target * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return mean.expand_as(target)


def biharmonic(target: Tensor, mask: Tensor) -> Tensor:
    """scikit-image's biharmonic inpainting of each image [C, H, W] in [-1, 1]."""
    holes = mask.permute(0, 2, 3, 1).bool().numpy()
    filled = [
        inpaint_biharmonic(
            np.where(hole, 0.0, image.permute(1, 2, 0).double().numpy()),
            hole[..., 0],
            channel_axis=-1,
        )
        for image, hole in zip(target, holes, strict=True)
    ]
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2).clamp(-1, 1).to(target.dtype)


def _speed(
    directory: Path, pipeline: Pipeline, target: Tensor, mask: Tensor, seeds: Tensor
) -> dict[str, Any]:
    wide = load(directory, device=pipeline.device, precision="float32")
    plain = load(directory, device=pipeline.device, precision="float32")
    unfuse(plain.network)

    def through(model: Pipeline) -> Callable[[], Tensor]:
        return lambda: model.complete(target, mask, seeds).cpu()

    name = str(pipeline.dtype).removeprefix("torch.")
    paths = {
        "plain PyTorch, float32": through(plain),
        "fused, float32": through(wide),
        f"fused, {name} (as sampled)": through(pipeline),
    }
    results = {label: path() for label, path in paths.items()}
    seconds: dict[str, list[float]] = {label: [] for label in paths}
    for _ in range(_ROUNDS):
        for label, path in paths.items():
            start = time.perf_counter()
            path()
            seconds[label].append(time.perf_counter() - start)
    first = next(iter(paths))
    base = statistics.median(seconds[first])
    return {
        label: {
            "seconds": statistics.median(seconds[label]),
            "ratio": base / statistics.median(seconds[label]),
            "largest difference": float((results[label] - results[first]).abs().max() * 127.5),
        }
        for label in paths
    }


def _draw(
    directory: Path, pipeline: Pipeline, target: Tensor, mask: Tensor, seeds: Tensor, draws: Tensor
) -> None:
    shown = slice(0, _PICTURED)
    known = torch.where(mask.bool(), 1.0, target)
    columns = {"input": known[shown]}
    columns |= {f"sample {i + 1}": draws[i][shown] for i in range(min(3, len(draws)))}
    columns |= {"mean": draws.mean(dim=0)[shown], "truth": target[shown]}
    pictures.grid(columns).save(directory / "grid.png")

    frames: list[Tensor] = []

    def keep(_: int, estimate: Tensor) -> None:
        frames.append(torch.where(mask[:4].bool(), estimate.cpu(), target[:4]))

    pipeline.complete(target[:4], mask[:4], seeds[:4], on_step=keep)
    pictures.strip(frames).save(directory / "strip.png")
    pictures.save_gif(frames, directory / "process.gif")
    pictures.save_loss_curve(directory / "metrics.jsonl", directory / "loss.png")


def _tables(quality: dict[str, float], speed: dict[str, Any], *, crops: int, steps: int) -> str:
    base = quality["mean colour of the known pixels"]
    lines = [
        f"Quality: mean absolute error in the hole, levels of 255, {crops} crops never trained on",
        "",
        "| | error | against the mean colour |",
        "|---|---|---|",
        *(f"| {name} | {value:.2f} | {value / base - 1:+.1%} |" for name, value in quality.items()),
        "",
        f"Speed: {min(crops, _TIMED)} crops, {steps} evaluations each, median of {_ROUNDS}",
        "",
        "| | seconds | ratio | largest difference, levels of 255 |",
        "|---|---|---|---|",
        *(_speed_row(name, row) for name, row in speed.items()),
    ]
    return "\n".join(lines) + "\n"


def _speed_row(name: str, row: dict[str, float]) -> str:
    difference = row["largest difference"]
    return f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} | {difference:.3g} |"
