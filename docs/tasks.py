"""Draw docs/tasks.png from the runs that configs/tasks.yaml describes, one of each task.

python docs/tasks.py runs    # runs/inpaint, runs/uncrop, ..., runs/paired
python docs/tasks.py --pairs DIR    # first: edges and photographs, for a run of ``paired``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

import palette
from palette.build import build_datasets
from palette.data.degrade import lower
from palette.data.images import to_image
from palette.data.order import Draws
from palette.data.photos import Photos

TASKS = (
    "inpaint",
    "uncrop",
    "colorize",
    "restore_jpeg",
    "upscale",
    "generate",
    "mixture",
    "paired",
)
CROPS = 4  # the first held-out ones, not chosen by eye
SIDE, GAP, LABEL = 64, 2, 92  # pixels
PAIRS = 900
SOLVER = "ddpm"


def pictures(model: palette.Pipeline) -> list[Image.Image]:
    """Input, sample and truth of each crop in turn; samples alone where nothing is the input."""
    if model.config.task.name == "generate":
        made: list[Image.Image] = model.generate(3 * CROPS, seed=0, solver=SOLVER)
        return made
    _, held_out = build_datasets(model.config)
    assert held_out is not None
    found = []
    for index in range(CROPS):
        entry = held_out[0, index]
        found += [*input_and_sample(model, entry, index), to_image(entry["target"])]
    return found


def input_and_sample(
    model: palette.Pipeline, entry: dict[str, Any], seed: int
) -> tuple[Image.Image, Image.Image]:
    """What the method of the entry's task is given, a hole in grey, and what it makes of it."""
    task = entry.get("task", model.config.task.name)
    shown = to_image(entry["condition"])
    if task in ("inpaint", "uncrop"):
        hole = entry["mask"]
        shown = to_image(torch.where(hole.bool(), 0.0, entry["target"]))
        mask = hole[0].numpy().astype(np.uint8)
        return shown, model.inpaint(shown, mask, seed=seed, solver=SOLVER)
    if task == "upscale":
        shown = to_image(lower(entry["target"], model.config.task.factor))
    return shown, getattr(model, task)(shown, seed=seed, solver=SOLVER)


def make_pairs(folder: Path) -> None:
    """Crops of the sample photographs in ``folder/photographs``, and their edges in
    ``folder/edges``."""
    photos = Photos(image_size=(32, 32), samples=PAIRS)
    targets, conditions = folder / "photographs", folder / "edges"
    for each in (targets, conditions):
        each.mkdir(parents=True, exist_ok=True)
    for index in range(PAIRS):
        crop, name = photos.load(index, Draws(index)), f"{photos.name(index)}.png"
        crop.save(targets / name)
        crop.convert("L").filter(ImageFilter.FIND_EDGES).save(conditions / name)


def main(runs: Path) -> None:
    """Write docs/tasks.png."""
    size = (LABEL + 3 * CROPS * (SIDE + GAP) - GAP, len(TASKS) * (SIDE + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, task in enumerate(TASKS):
        top = row * (SIDE + GAP)
        draw.text((2, top + SIDE // 2 - 6), task, fill="black")
        for column, picture in enumerate(pictures(palette.load(runs / task))):
            cell = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(cell, (LABEL + column * (SIDE + GAP), top))
    sheet.save(Path(__file__).with_name("tasks.png"), optimize=True)


if __name__ == "__main__":
    if sys.argv[1] == "--pairs":
        make_pairs(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
