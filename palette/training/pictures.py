"""Pictures of a run: grids, the denoising strip and GIF, the loss curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw
from torch import Tensor

from palette.data.images import to_image

_SEEN = 96  # pixels a side that a small sample is magnified to, so that a person can see it
_GAP = 2


def grid(columns: dict[str, Tensor]) -> PILImage.Image:
    """One row per image, one titled column per tensor.

    Args:
        columns: title -> [N, C, H, W] in [-1, 1], all of one shape.

    Returns:
        A picture; pixels of small images are magnified by a whole factor.
    """
    batches = list(columns.values())
    count, _, height, width = batches[0].shape
    factor = max(1, _SEEN // max(height, width))
    cell = (width * factor, height * factor)
    title = 14
    sheet = PILImage.new(
        "RGB",
        ((cell[0] + _GAP) * len(batches) - _GAP, title + (cell[1] + _GAP) * count - _GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (name, batch) in enumerate(columns.items()):
        left = column * (cell[0] + _GAP)
        draw.text((left + 2, 1), name, fill="black")
        for row, image in enumerate(batch.cpu()):
            sheet.paste(_magnified(image, cell), (left, title + row * (cell[1] + _GAP)))
    return sheet


def strip(frames: Sequence[Tensor], count: int = 10) -> PILImage.Image:
    """``count`` frames [N, C, H, W] of a reverse process, evenly chosen, time to the right."""
    return grid({f"step {index}": frames[index] for index in evenly(len(frames), count)})


def evenly(total: int, count: int) -> list[int]:
    """At most ``count`` of the numbers below ``total``, evenly spread from 0 to the last."""
    return sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})


def save_gif(frames: Sequence[Tensor], path: Path, seconds: float = 3.0) -> None:
    """Write the reverse process as an endless animation, result held.

    Args:
        frames: [N, C, H, W] in [-1, 1] each; the images stand side by side.
        path: ends in ``.gif``.
        seconds: from the first frame to the last.
    """
    pages = [grid({str(i + 1): image[None] for i, image in enumerate(frame)}) for frame in frames]
    pause = int(1000 * seconds / len(pages))
    pages[0].save(
        path,
        save_all=True,
        append_images=pages[1:],
        duration=[pause] * (len(pages) - 1) + [1500],
        loop=0,
    )


def save_loss_curve(metrics: Path, path: Path) -> None:
    """Draw the losses of a ``metrics.jsonl`` (training, its running mean, validation) as a PNG."""
    from matplotlib.figure import Figure  # half a second to import, needed once a run

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    axes.plot(*zip(*training, strict=True), color="0.8", linewidth=0.8, label="training loss")
    axes.plot(*zip(*smoothed(training), strict=True), color="tab:blue", label="running mean")
    key = "validation_loss"
    validation = [(line["step"], line[key]) for line in lines if key in line]
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:red", label="validation loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=120)


def smoothed(points: Sequence[tuple[float, float]], keep: float = 0.8) -> list[tuple[float, float]]:
    """The running mean of (step, value): each value counts ``keep`` times the one after it."""
    mean, weight, result = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        result.append((step, mean / weight))
    return result


def _magnified(image: Tensor, size: tuple[int, int]) -> PILImage.Image:
    return to_image(image).convert("RGB").resize(size, PILImage.Resampling.NEAREST)
