"""From files and folders of images to a folder of samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from palette.data.paths import scan
from palette.pipeline import Pipeline


def sample_files(
    model: Pipeline,
    inputs: list[Path],
    mask: Path | None,
    output: Path,
    *,
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    solver: str | None = None,
    native: bool = False,
) -> Iterator[Path]:
    """Sample for every image of ``inputs`` and write lossless PNG files into ``output``.

    Args:
        model: an inpainting model.
        inputs: images, or folders of images.
        mask: one image for all, or a folder with a mask of the same name for each.
        output: folder for the results, made where missing; nothing is written outside it.
        count: samples per image.
        seed: the i-th picture written has seed ``seed + i``.
        steps: network evaluations.
        solver: reverse process.
        native: run the network at the image's own size.

    Yields:
        The path of each file written. Its text chunk ``palette`` holds model, weights, seed, steps.

    Raises:
        ValueError: no input, no mask for an image, or a mask of another size.
    """
    if mask is None:
        raise ValueError("--mask: found none; inpainting wants an image whose white part is filled")
    pictures = [path for given in inputs for path in _images(given)]
    output.mkdir(parents=True, exist_ok=True)
    names = unique([path.stem for path in pictures])
    for index, (path, name) in enumerate(zip(pictures, names, strict=True)):
        hole = _mask_for(path, mask)
        for copy in range(count):
            number = seed + index * count + copy
            result = model.inpaint(
                path, hole, seed=number, steps=steps, solver=solver, native=native, progress=True
            )
            target = output / (f"{name}.png" if count == 1 else f"{name}_{copy}.png")
            write_png(target, result, model.record(number, steps=steps, solver=solver))
            yield target


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


def _mask_for(picture: Path, mask: Path) -> Path:
    if not mask.exists():
        raise FileNotFoundError(f"--mask: {mask} does not exist")
    if not mask.is_dir():
        return mask
    matching = [path for path in _found(mask) if path.stem == picture.stem]
    if len(matching) != 1:
        raise ValueError(f"--mask: {mask} has {len(matching)} files named {picture.stem}, wants 1")
    return matching[0]


def unique(stems: list[str]) -> list[str]:
    """The stems, numbered where two inputs would write the same file."""
    seen: dict[str, int] = {}
    names = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}~{seen[stem]}")
    return names
