"""Scores two folders of images: samples beside the truth, or two sets of pictures as such."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from palette.data.paths import printable
from palette.metrics import cache as cached
from palette.metrics.kept import KEPT
from palette.metrics.pairing import (
    PUBLISHED,
    Files,
    Folder,
    Input,
    Sample,
    check_labels,
    find_masks,
    list_both,
    list_files,
    pair,
)
from palette.metrics.reading import Size, prepared, read_ahead, read_mask, read_picture
from palette.metrics.scorer import Networks, Scorer
from palette.metrics.scores import Scores
from palette.metrics.statistics import FeatureStatistics, Gather
from palette.metrics.summary import summarise

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many images of this process are done, and of how many."""


class Shard(NamedTuple):
    """The part of the images that this process looks at, and how it hears of the others' parts."""

    rank: int = 0
    size: int = 1
    gather: Gather = lambda value: [value]


def score_folders(
    samples: Folder,
    truth: Folder,
    *,
    reference: Folder | None = None,
    masks: Folder | None = None,
    labels: Mapping[str, int] | None = None,
    networks: Networks | None = None,
    paired: bool = True,
    size: Size | None = None,
    batch_size: int = 16,
    cache: Folder | None = None,
    keep: int = KEPT,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> Scores:
    """All scores of the images in one folder.

    Args:
        samples: what is scored. An image pairs with the truth of the same name; where inputs have
            several samples these are called <name>_0, <name>_1, ... and their diversity is scored.
        truth: the real images. The same folder as ``samples`` may hold both as the published test
            writes them (Out_x, GT_x).
        reference: real images for FID, KID, precision and recall, such as a whole validation set;
            the truth where not given.
        masks: one mask for all, or a folder with one of each truth's name; white is the hole.
        labels: name of the truth to its class, for CA (``pairing.read_labels``).
        networks: feature networks; the built-in ones where not given.
        paired: False: two sets of pictures with nothing to do with each other.
        size: (height, width) to crop and resize all to; they are scored as they are otherwise.
        batch_size: images a network sees at once.
        cache: folder for the reference's statistics, which are then computed only once: they are
            found again by the contents of its images in order of names, the network, ``size`` and
            ``keep``.
        keep: how many images' features are kept whole, for KID, precision and recall.
        shard: the place of this process among several; all get the same scores.
        progress: hears how far it is.

    Raises:
        ValueError: a folder without images, an image without partner, of another size than its
            partner or unreadable; networks that do not work.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    networks, shard = networks or Networks(), shard or Shard()
    reader = _Reader(size, batch_size, shard, progress)
    found, real = list_both(samples, truth) if paired else (list_files(samples), list_files(truth))
    scorer = Scorer(networks, keep=keep)
    if paired:
        inputs = pair(found, real)
        prefix = PUBLISHED[2] if os.path.realpath(samples) == os.path.realpath(truth) else ""
        names = [one.name for one in inputs]
        holes = None if masks is None else find_masks(masks, names, prefix=prefix)
        if labels is not None:
            check_labels(labels, names)
        reader.score_inputs(scorer, inputs, holes, labels)
    else:
        if masks is not None or labels is not None:
            raise ValueError("masks and labels: need paired=True, which says what they belong to")
        reader.score_set(scorer, found)
    facts: dict[str, str | int] = {
        "samples folder": printable(samples),
        "truth folder": printable(truth),
        "pictures": prepared(size),
    }
    if masks is not None:
        facts["masks"] = printable(masks)
    statistics = None
    if reference is not None or not paired:
        files = real if reference is None else list_files(reference)
        facts["reference folder"] = printable(truth if reference is None else reference)
        statistics = reader.statistics(files, networks, keep, cache)
    tally = scorer.gathered(shard.gather)
    return summarise(
        tally,
        networks,
        statistics,
        protocol=facts,
        names=dict(enumerate(found)),
        inputs=dict(enumerate(real)) if paired else None,
    )


class _Loaded(NamedTuple):
    """An input in memory: uint8 [3, H, W] pictures and [1, H, W] mask."""

    input: Input
    truth: Tensor
    samples: list[Tensor]
    mask: Tensor | None


class _Reader:
    """Goes over files in batches of one size, those of this process only."""

    def __init__(
        self, size: Size | None, batch_size: int, shard: Shard, progress: Progress | None
    ) -> None:
        self.size, self.batch_size, self.shard = size, batch_size, shard
        self.progress: Progress = progress or (lambda what, done, total: None)

    def score_inputs(
        self,
        scorer: Scorer,
        inputs: list[Input],
        masks: Mapping[str, str] | None,
        labels: Mapping[str, int] | None,
    ) -> None:
        """Pairs, in batches of about ``batch_size`` samples."""
        mine = inputs[self.shard.rank :: self.shard.size]
        batch: list[_Loaded] = []
        for done, loaded in enumerate(read_ahead(lambda one: self._load(one, masks), mine), 1):
            if batch and batch[0].truth.shape != loaded.truth.shape:
                _score(scorer, batch, labels)
                batch = []
            batch.append(loaded)
            if sum(len(one.samples) for one in batch) >= self.batch_size:
                _score(scorer, batch, labels)
                batch = []
            self.progress("samples", done, len(mine))
        if batch:
            _score(scorer, batch, labels)

    def score_set(self, scorer: Scorer, files: Files) -> None:
        """Pictures without partners."""
        for pictures, indices in self._batches(files, "samples"):
            scorer.update(pictures, indices)

    def statistics(
        self, files: Files, networks: Networks, keep: int, cache: Folder | None
    ) -> FeatureStatistics:
        """Of all files, on every process; read from the cache or left there."""
        if cache is None:
            return self._computed(files, networks, keep)
        key = cached.Key(
            data=cached.hash_files(list(files.values())),
            network=networks.extractor.identity,
            prepared=prepared(self.size),
            keep=keep,
        )
        found = cached.load(Path(cache), key)
        # one process may see the file before another one does: all compute, or none
        if not all(self.shard.gather(found is not None)) or found is None:
            found = self._computed(files, networks, keep)
            if self.shard.rank == 0:
                cached.store(Path(cache), key, found)
        return found

    def _computed(self, files: Files, networks: Networks, keep: int) -> FeatureStatistics:
        statistics = networks.statistics(keep)
        for pictures, indices in self._batches(files, "reference"):
            statistics.update(networks.features(pictures).values, indices)
        return statistics.gathered(self.shard.gather)

    def _batches(self, files: Files, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures [N, 3, H, W] of one size and their numbers [N]."""
        numbers = range(self.shard.rank, len(files), self.shard.size)
        paths = list(files.values())
        batch: list[Tensor] = []
        start = 0  # how many were handed out
        read = read_ahead(lambda number: read_picture(paths[number], self.size), numbers)
        for picture in read:
            if batch and (len(batch) == self.batch_size or batch[0].shape != picture.shape):
                yield torch.stack(batch), torch.tensor(numbers[start : start + len(batch)])
                start += len(batch)
                self.progress(what, start, len(numbers))
                batch = []
            batch.append(picture)
        if batch:
            yield torch.stack(batch), torch.tensor(numbers[start:])
            self.progress(what, len(numbers), len(numbers))

    def _load(self, one: Input, masks: Mapping[str, str] | None) -> _Loaded:
        truth = read_picture(one.truth, self.size)
        samples = [self._sample(sample, one, truth) for sample in one.samples]
        mask = None if masks is None else read_mask(masks[one.name], truth, self.size)
        return _Loaded(one, truth, samples, mask)

    def _sample(self, sample: Sample, one: Input, truth: Tensor) -> Tensor:
        picture = read_picture(sample.path, self.size)
        if picture.shape != truth.shape:
            found, wanted = (f"{p.shape[1]}x{p.shape[2]}" for p in (picture, truth))
            raise ValueError(
                f"{printable(sample.path)} is {found}, its truth {printable(one.truth)} {wanted} "
                "(height x width); size=(height, width) crops and resizes both"
            )
        return picture


def _score(scorer: Scorer, batch: list[_Loaded], labels: Mapping[str, int] | None) -> None:
    """Hand a batch of inputs of one size to the scorer."""
    repeated = [one for one in batch for _ in one.samples]
    masks = [one.mask for one in repeated if one.mask is not None]
    scorer.update(
        torch.stack([picture for one in batch for picture in one.samples]),
        torch.tensor([sample.number for one in batch for sample in one.input.samples]),
        truth=torch.stack([one.truth for one in repeated]),
        inputs=torch.tensor([one.input.number for one in repeated]),
        mask=torch.stack(masks) if masks else None,
        labels=None
        if labels is None
        else torch.tensor([labels[one.input.name] for one in repeated]),
    )
    for one in batch:
        scorer.update_group(torch.stack(one.samples), one.input.number)
