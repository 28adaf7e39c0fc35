"""From files and folders of images to a folder of samples."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from palette.build import trained_tasks
from palette.data.canvas import Rectangle
from palette.data.masks import is_name
from palette.data.paths import scan
from palette.pipeline import Pipeline

_AT_ONCE = 16  # generated pictures kept in memory until they are written

Draw = Callable[[Path, dict[str, Any]], PILImage.Image]


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a user may say of one task; None is the task's own default.

    Attributes:
        task: which of its tasks a model of several is to do.
        mask: to inpaint: an image for all, a folder with a mask of the same name for each, or a
            name of ``palette.data.masks``.
        side, by, rectangle: to uncrop; see ``Pipeline.uncrop``.
        panorama: pixels of width to uncrop to, again and again.
        factor, augmentation: see ``Pipeline.upscale``; for this model and those behind it.
        size: height and width, to generate.
    """

    task: str | None = None
    mask: str | None = None
    side: str | None = None
    by: float | None = None
    rectangle: Rectangle | None = None
    panorama: int | None = None
    factor: float | None = None
    augmentation: float | None = None
    size: tuple[int, int] | None = None

    def only(self, task: str, *allowed: str) -> None:
        """Raises ValueError where something is said that the task cannot make use of."""
        for field in dataclasses.fields(self)[1:]:
            if getattr(self, field.name) is not None and field.name not in allowed:
                raise ValueError(f"--{field.name}: says nothing to the task {task}")


def sample_files(
    models: Sequence[Pipeline],
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
        models: one for the task wanted, and any number that upscale what the one before made.
        inputs: images, or folders of images; none where pictures are generated.
        output: folder for the results, made where missing; nothing is written outside it.
        wishes: what to do.
        count: samples per image.
        seed: the i-th picture written has seed ``seed + i``.
        options: see ``palette.pipeline.Options``; a label is for the models that have classes.

    Yields:
        The path of each file written. Its text chunk ``palette`` holds model, weights, seed, steps,
        in ``then`` those of the models behind the first.

    Raises:
        ValueError: no input, no mask for an image, a mask of another size, a wish that the model
            cannot fulfil, or a result that would be written over an input or a mask.
    """
    first, *stages = models
    task = _task(first, wishes.task)
    draw = _drawing(first, task, wishes, cascade=bool(stages))
    told = [_told(stage, options) for stage in stages]
    planned = _numbered(task, inputs, count)
    read = [path for path, _ in planned] + _mask_files(wishes.mask)
    _spare(read, (output / name for _, name in planned))
    for path, name in planned:
        output.mkdir(parents=True, exist_ok=True)
        result = draw(path, {**options, "seed": seed, "progress": True})
        record = {**first.record(seed, **options), **_upscaling(wishes)}
        for stage, chosen in zip(stages, told, strict=True):
            result = stage.upscale(
                result,
                wishes.factor,
                augmentation=wishes.augmentation,
                **{**chosen, "seed": seed, "progress": True},
            )
        if stages:
            pairs = zip(stages, told, strict=True)
            record["then"] = [stage.record(seed, **chosen) for stage, chosen in pairs]
        write_png(output / name, result, record)
        yield output / name
        seed += 1


def generate_files(
    model: Pipeline, output: Path, prefix: str, count: int, *, seed: int = 0, **options: Any
) -> Iterator[Path]:
    """Make ``count`` pictures from nothing, in batches, into ``<output>/<prefix>_<number>.png``.

    Args:
        model: trained to generate.
        output: folder for the results, made where missing; nothing is written outside it.
        prefix: a plain name.
        count: how many pictures, numbered from 0.
        seed: picture i has ``seed + i``.
        options: see ``palette.pipeline.Options``.

    Yields:
        The path of each file written, with the text chunk that ``sample_files`` writes.

    Raises:
        ValueError: the prefix leads elsewhere, or the model was not trained to generate.
    """
    if Path(prefix).name != prefix:
        raise ValueError(f"--name: found '{prefix}', wants the plain beginning of a file name")
    for start in range(0, count, _AT_ONCE):
        number = min(_AT_ONCE, count - start)
        pictures = model.generate(number, seed=seed + start, progress=True, **options)
        output.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures, start):
            path = output / f"{prefix}_{index:06d}.png"
            write_png(path, picture, model.record(seed + index, **options))
            yield path


def _upscaling(wishes: Wishes) -> dict[str, Any]:
    """What a picture's record has to say of it."""
    said = {"factor": wishes.factor, "augmentation": wishes.augmentation}
    return {name: value for name, value in said.items() if value is not None}


def _told(stage: Pipeline, options: dict[str, Any]) -> dict[str, Any]:
    """The options, without the label where a model behind the first has no classes."""
    if stage.config.model.num_classes is not None:
        return options
    return {key: value for key, value in options.items() if key not in ("label", "guidance")}


def _numbered(task: str, inputs: list[Path], count: int) -> list[tuple[Path, str]]:
    """Each picture to be drawn: what it is made from, and the name of its file."""
    if task == "generate":
        if inputs:
            raise ValueError(f"--input: found {inputs[0]}; generate makes pictures from nothing")
        return [(Path(), f"{number:06d}.png") for number in range(count)]
    if not inputs:
        raise ValueError(f"--input: found none; the task {task} wants images")
    pictures = [path for given in inputs for path in _images(given)]
    names = unique([path.stem for path in pictures])
    return [
        (path, f"{name}.png" if count == 1 else f"{name}_{copy}.png")
        for path, name in zip(pictures, names, strict=True)
        for copy in range(count)
    ]


def _spare(read: Iterable[Path], written: Iterable[Path]) -> None:
    """Refuse to write over what is read: a result bears the name of its input."""
    kept = {_identity(path) for path in read if path.is_file()}
    for target in written:
        if target.exists() and _identity(target) in kept:
            raise ValueError(f"--output: {target} would overwrite an input; name another folder")


def _identity(path: Path) -> tuple[int, int]:
    """The same for every name of a file, through links and in any case of letters."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _drawing(model: Pipeline, task: str, wishes: Wishes, *, cascade: bool) -> Draw:
    """One picture from one file, by the method of the task."""
    upscaling = ("factor", "augmentation") if cascade or task == "upscale" else ()
    if task in ("inpaint", "uncrop"):
        wishes.only(task, "mask", "side", "by", "rectangle", "panorama", *upscaling)
        return _filling(model, task, wishes)
    if task == "generate":
        wishes.only(task, "size", *upscaling)
        return lambda _, options: model.generate(size=wishes.size, **options)
    wishes.only(task, *upscaling)
    if task == "upscale":
        factor, augmentation = wishes.factor, wishes.augmentation
        return lambda path, options: model.upscale(
            path, factor, augmentation=augmentation, **options
        )
    method = getattr(model, task, model.paired)  # a task of the user's own translates pictures
    return lambda path, options: method(path, **options)


def _filling(model: Pipeline, task: str, wishes: Wishes) -> Draw:
    """One picture with its hole filled, or continued beyond its border."""
    mask, width, wanted = wishes.mask, wishes.panorama, (wishes.side, wishes.by, wishes.rectangle)
    if sum((mask is not None, width is not None, any(each is not None for each in wanted))) > 1:
        raise ValueError("--mask, --panorama, --side or --rectangle: give one of them, not several")
    if mask is not None:
        return lambda path, options: model.inpaint(path, _mask_for(path, mask), **options)
    if width is not None:
        return lambda path, options: model.panorama(path, width, **options)
    if task == "inpaint" and all(each is None for each in wanted):
        raise ValueError("--mask: found none; inpainting wants an image whose white part is filled")
    return lambda path, options: model.uncrop(
        path, wishes.side, by=wishes.by, rectangle=wishes.rectangle, **options
    )


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


def _mask_files(mask: str | None) -> list[Path]:
    """What ``--mask`` may read; of a mask by name nothing, and a missing one is named later."""
    if mask is None or is_name(mask):
        return []
    return _found(Path(mask)) if os.path.isdir(mask) else [Path(mask)]


def _mask_for(picture: Path, mask: str) -> str:
    if is_name(mask):
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
    taken, numbers = set(stems), dict.fromkeys(stems, 0)
    names = []
    for stem in stems:
        name = stem
        while numbers[stem] > 0 and name in taken:
            numbers[stem] += 1
            name = f"{stem}~{numbers[stem]}"
        numbers[stem] = max(numbers[stem], 1)
        taken.add(name)
        names.append(name)
    return names
