"""Samples by (epoch, position), batches of them, and the order of a whole run.

The samples of a run are numbered 0, 1, 2, ...; number g is position g % length of epoch
g // length. Batches are slices of that sequence, so a run that continues at any number, on any
count of processes, goes on with the samples it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palette.data import images, tasks
from palette.data.images import UnreadableImage
from palette.data.order import Draws, permute, sample_seeds
from palette.data.sources import Given, Labelled, Pair, Source
from palette.data.tasks import Entry, Task

Key = tuple[int, int]  # epoch, position
Batch = dict[str, Any]
Fit = Literal["largest", "zoom", "center", "squash"]
Skipped = list[tuple[str, str]]
"""Name and reason of each picture that could not be read; of a mask twice the reason."""

_SOURCE_LAYER, _TASK_LAYER, _FIT_LAYER = 0, 1, 2
_TASK_WORDS = 64  # of a mask's draws, made for a whole batch at once
_ATTEMPTS = 32  # stand-ins tried for one picture before the source is given up
_MAX_ZOOM = 8.0


class _Loaded(NamedTuple):
    """A sample's picture (of a pair both) at the wanted size, and what is known of it."""

    pictures: list[Image.Image]
    name: str
    label: int | None
    skipped: Skipped


class UnreadableImages(ValueError):  # noqa: N818 - the name is part of the interface
    """Too many pictures cannot be read; the message is one line, with their names."""


class TaskDataset(torch.utils.data.Dataset[Entry]):
    """A source and a task: the entry at (epoch, position).

    ``image_size`` is n or (height, width), ``channels`` 1 or 3. Pictures of another size are
    cropped and resized as ``fit`` says: "largest" crop of the right proportions at a random place,
    "zoom", a random crop down to an eighth of that (but of no fewer pixels than wanted), "center",
    the largest crop in the middle, or "squash", all of it, proportions lost. ``flip`` mirrors half
    of the samples. ``shuffle`` False keeps the order of the source in every epoch, ``fresh`` False
    what the task draws for a picture (its hole, quality and the like).

    An entry is what the task returns, with ``name``, ``seed``, ``label`` where the source has
    classes, and ``skipped``: the pictures that could not be read and were replaced by others,
    chosen by the same numbers, and the masks, in place of which the next was drawn. Raises
    UnreadableImages when none of 33 pictures, or of 32 masks drawn, can be read.
    """

    def __init__(
        self,
        source: Source,
        task: Task,
        image_size: int | tuple[int, int],
        run_seed: int,
        *,
        channels: int = 3,
        fit: Fit = "largest",
        flip: bool = False,
        shuffle: bool = True,
        fresh: bool = True,
    ) -> None:
        self.source = source
        self.image_size = (image_size,) * 2 if isinstance(image_size, int) else image_size
        self._task = task
        self._takes_noise = tasks.takes(task, "noise")
        self._takes_condition = tasks.takes(task, "condition")
        self._run_seed = run_seed
        self._channels = channels
        self._fit: Fit = fit
        self._flip = flip
        self._shuffle = shuffle
        self._fresh = fresh

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.source)

    def __getitem__(self, key: Key) -> Entry:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Entry]:
        """Entries of several samples; the noise of their conditions is drawn in one go."""
        numbers = self._numbers(keys)
        seeds = [seed for _, seed in numbers]
        fits = Draws.many(seeds, layer=_FIT_LAYER)
        loaded = [
            self._load(key, index, seed, fit)
            for key, (index, seed), fit in zip(keys, numbers, fits, strict=True)
        ]
        pixels = images.to_batch([each.pictures[0] for each in loaded], self._channels)
        noise = tasks.condition_noise(seeds, tuple(pixels.shape[1:])) if self._takes_noise else None
        drawn = seeds
        if not self._fresh:
            drawn = sample_seeds(self._run_seed, 0, [index for index, _ in numbers]).tolist()
        draws = Draws.many(drawn, layer=_TASK_LAYER, ahead=_TASK_WORDS)
        entries = []
        for place, (seed, found) in enumerate(zip(seeds, loaded, strict=True)):
            extra = {} if noise is None else {"noise": noise[place]}
            if len(found.pictures) > 1:
                extra["condition"] = images.to_tensor(found.pictures[1], self._channels)
            entry, bad = self._made(pixels[place], seed, draws[place], extra)
            if found.label is not None:
                entry = {**entry, "label": found.label}
            skipped = found.skipped + bad
            entries.append({**entry, "name": found.name, "seed": seed, "skipped": skipped})
        return entries

    def _made(
        self, image: Tensor, seed: int, draws: Draws, extra: dict[str, Tensor]
    ) -> tuple[Entry, Skipped]:
        """What the task makes, and the masks that could not be read before."""
        bad: dict[str, None] = {}
        for _ in range(_ATTEMPTS):
            try:
                return self._task(image, seed, draws, **extra), [(each, each) for each in bad]
            except UnreadableImage as error:  # its draws go on from here
                bad[str(error)] = None
        first = next(iter(bad))
        raise UnreadableImages(f"none of {len(bad)} masks tried can be read; the first: {first}")

    def _numbers(self, keys: Sequence[Key]) -> list[tuple[int, int]]:
        """Index in the source and seed of each sample, an epoch at a time."""
        out: dict[Key, tuple[int, int]] = {}
        for epoch in {epoch for epoch, _ in keys}:
            positions = np.array([position for other, position in keys if other == epoch])
            order = positions
            if self._shuffle:
                order = permute(self._run_seed, epoch, positions, len(self))
            seeds = sample_seeds(self._run_seed, epoch, order)
            for position, index, seed in zip(positions, order, seeds, strict=True):
                out[epoch, int(position)] = int(index), int(seed)
        return [out[epoch, position] for epoch, position in keys]

    def _load(self, key: Key, index: int, seed: int, fit: Draws) -> _Loaded:
        """The picture (of a pair both) at ``index``, or the first to be read of a side order."""
        bad: dict[int, tuple[str, str]] = {}
        for candidate in self._candidates(key, index):
            if candidate in bad:
                continue
            try:
                given = self.source.load(candidate, Draws(seed, layer=_SOURCE_LAYER))
                label = given.label if isinstance(given, Labelled) else None
                fitted = self._fitted_all(given, fit)
                return _Loaded(fitted, self.source.name(candidate), label, list(bad.values()))
            except UnreadableImage as error:
                bad[candidate] = (self.source.name(candidate), str(error))
        first = next(iter(bad.values()))[1]
        raise UnreadableImages(f"none of {len(bad)} images tried can be read; the first: {first}")

    def _candidates(self, key: Key, index: int) -> Iterator[int]:
        yield index
        epoch, position = key
        places = (position + np.arange(min(_ATTEMPTS, len(self)))) % len(self)
        yield from permute(self._run_seed, epoch, places, len(self), spare=True).tolist()

    def _fitted_all(self, given: Given, draws: Draws) -> list[Image.Image]:
        """The picture, or both of a pair, at the wanted size, perhaps mirrored."""
        numbers = draws.uniform(4).tolist()
        if isinstance(given, Labelled):
            given = given.image
        if not isinstance(given, Pair):
            return [self._fitted(given, *numbers)]
        if not self._takes_condition:
            raise ValueError("source: its pairs need a task with a condition: colorize or paired")
        return [self._fitted(image, *numbers) for image in given]

    def _fitted(
        self, image: Image.Image, x: float, y: float, zoom: float, mirror: float
    ) -> Image.Image:
        size = self.image_size
        if image.size != (size[1], size[0]):
            if self._fit == "squash":
                image = images.squash(image, size)
            elif self._fit == "center":
                image = images.resize_crop(image, size)
            else:
                room = min(image.height / size[0], image.width / size[1], _MAX_ZOOM)
                factor = max(room, 1.0) ** zoom if self._fit == "zoom" else 1.0
                image = images.resize_crop(image, size, x=x, y=y, zoom=factor)
        if self._flip and mirror < 0.5:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class Batches(torch.utils.data.Sampler[list[Key]]):
    """Keys of one rank's share of each batch, from sample number ``start`` on.

    ``batch_size`` counts this rank's samples; ``world`` ranks together take the next
    batch_size * world samples, rank 0 the first of them. Without ``stop`` it never ends, and
    a batch may reach from one epoch into the next; with it the last batch may be smaller, or
    missing for some ranks. Raises ValueError for numbers that make no sense.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for name, value, least in (
            ("length", length, 1),
            ("batch_size", batch_size, 1),
            ("start", start, 0),
            ("world", world, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..{world - 1}, got {rank}")
        self._length, self._batch_size = length, batch_size
        self._start, self._stop = start, stop
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[list[Key]]:
        first = self._start + self._rank * self._batch_size
        while self._stop is None or first < self._stop:
            last = first + self._batch_size
            if self._stop is not None:
                last = min(last, self._stop)
            yield [divmod(number, self._length) for number in range(first, last)]
            first += self._batch_size * self._world


def collate(entries: Sequence[Entry]) -> Batch:
    """A batch: tensors stacked to [N, ...], seeds and labels int64 [N], names a list.

    ``skipped`` lists the pictures that were replaced in it. Raises ValueError when the entries do
    not go together.
    """
    batch: Batch = {}
    for key in entries[0]:
        values = [entry[key] for entry in entries]
        if key == "skipped":
            batch[key] = [pair for value in values for pair in value]
        elif isinstance(values[0], Tensor):
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise ValueError(f"'{key}' has different shapes in one batch: {sorted(shapes)}")
            batch[key] = torch.stack(values)
        elif isinstance(values[0], int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[key] = values
    return batch
