"""From files and folders of images to a folder of samples."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from palette.build import trained_tasks
from palette.data.masks import MASKS
from palette.data.paths import scan
from palette.pipeline import Pipeline

Draw = Callable[[Path, dict[str, Any]], PILImage.Image]


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a user may say of one task; None is the task's own default.

    Attributes:
        task: which of its tasks a model of several is to do.
        mask: to inpaint: an image for all, a folder with a mask of the same name for each, or a
            name of ``palette.data.masks``.
    """

    task: str | None = None
    mask: str | None = None

    def only(self, task: str, *allowed: str) -> None:
        """Raises ValueError where something is said that the task cannot make use of."""
        for field in dataclasses.fields(self)[1:]:
            if getattr(self, field.name) is not None and field.name not in allowed:
                raise ValueError(f"--{field.name}: says nothing to the task {task}")


def sample_files(
    model: Pipeline,
    inputs: list[Path],
    output: Path,
    wishes: Wishes,
    *,
    count: int = 1,
    seed: int = 0,
    **options: Any,
) -> Iterator[Path]:
    """Sample for every image of ``inputs`` and write lossless PNG files into ``output``.

    Args:
        model: for the task wanted.
        inputs: images, or folders of images.
        output: folder for the results, made where missing; nothing is written outside it.
        wishes: what to do.
        count: samples per image.
        seed: the i-th picture written has seed ``seed + i``.
        options: see ``palette.pipeline.Options``.

    Yields:
        The path of each file written. Its text chunk ``palette`` holds model, weights, seed, steps.

    Raises:
        ValueError: no input, no mask for an image, a mask of another size, or a wish that the
            model cannot fulfil.
    """
    draw = _drawing(model, wishes)
    pictures = [path for given in inputs for path in _images(given)]
    output.mkdir(parents=True, exist_ok=True)
    names = unique([path.stem for path in pictures])
    for index, (path, name) in enumerate(zip(pictures, names, strict=True)):
        for copy in range(count):
            number = seed + index * count + copy
            result = draw(path, {**options, "seed": number, "progress": True})
            target = output / (f"{name}.png" if count == 1 else f"{name}_{copy}.png")
            write_png(target, result, model.record(number, **options))
            yield target


def _drawing(model: Pipeline, wishes: Wishes) -> Draw:
    """One picture from one file, by the method of the task."""
    task = _task(model, wishes.task)
    if task in ("inpaint", "uncrop"):
        wishes.only(task, "mask")
        mask = wishes.mask
        if mask is None:
            raise ValueError(
                "--mask: found none; inpainting wants an image whose white part is filled"
            )
        return lambda path, options: model.inpaint(path, _mask_for(path, mask), **options)
    wishes.only(task)
    method = getattr(model, task, model.paired)  # a task of the user's own translates pictures
    return lambda path, options: method(path, **options)


def _task(model: Pipeline, wanted: str | None) -> str:
    trained = trained_tasks(model.config)
    if wanted is None and len(trained) == 1:
        return trained[0]
    if wanted not in trained:
        found = "nothing" if wanted is None else wanted
        raise ValueError(f"--task: found {found}; {model.name} does {', '.join(trained)}")
    return wanted


def write_png(path: Path, image: PILImage.Image, record: dict[str, Any]) -> None:
    """Write ``image`` losslessly, with ``record`` as JSON in the text chunk ``palette``.

    The file appears under its name only when it is whole.
    """
    text = PngInfo()
    text.add_text("palette", json.dumps(record))
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        image.save(temporary, format="PNG", pnginfo=text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _images(given: Path) -> list[Path]:
    if not given.exists():
        raise FileNotFoundError(f"--input: {given} does not exist")
    return _found(given) if given.is_dir() else [given]


def _found(folder: Path) -> list[Path]:
    paths = scan(folder)
    return [Path(paths.path(index)) for index in range(len(paths))]


def _mask_for(picture: Path, mask: str) -> str:
    if mask in MASKS:
        return mask
    where = Path(mask)
    if not where.exists():
        raise FileNotFoundError(f"--mask: {mask} does not exist, nor is there a mask of that name")
    if not where.is_dir():
        return mask
    matching = [path for path in _found(where) if path.stem == picture.stem]
    if len(matching) != 1:
        raise ValueError(f"--mask: {mask} has {len(matching)} files named {picture.stem}, wants 1")
    return str(matching[0])


def unique(stems: list[str]) -> list[str]:
    """The stems, numbered where two inputs would write the same file."""
    seen: dict[str, int] = {}
    names = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}~{seen[stem]}")
    return names
