"""From the pictures of an evaluation to ``scores.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from palette import _durable
from palette.evaluation.layout import SCORES, TABLE, write_json
from palette.evaluation.progress import Progress
from palette.metrics.folders import Shard, score_folders
from palette.metrics.kept import KEPT
from palette.metrics.pairing import (
    class_folders,
    labels_of_folders,
    list_files,
    plain_name,
    read_labels,
)
from palette.metrics.reading import Size
from palette.metrics.scorer import Networks
from palette.metrics.scores import Scores
from palette.training.distributed import World

FOLDERS = "folders"


@dataclasses.dataclass(frozen=True)
class Scoring:
    """With what samples are scored."""

    networks: Networks
    reference: Path | None = None
    """Folder of real images for FID, KID, precision and recall; the truth where None."""
    cache: Path | None = None
    """Folder for the statistics of the reference."""
    labels: str | None = None
    """File of lines "<image name> <class number>", or "folders"."""
    folders: Sequence[str] = ()
    """With "folders" the names of all, class 0, 1, …; where empty those of the pictures scored."""
    size: Size | None = None
    """(height, width) that all pictures are cropped and resized to."""
    batch_size: int = 16
    keep: int = KEPT
    """Images whose features are kept whole."""

    def check(self, names: dict[str, str], *, paired: bool = True) -> None:
        """What can be told before hours of sampling: raises ValueError as scoring would.

        Args:
            names: of the truths' files, and those that their classes are known by.
            paired: whether samples belong to truths.
        """
        if self.reference is not None:
            list_files(self.reference)
        if self.labels is not None:
            if not paired:
                raise ValueError(f"labels {self.labels}: these samples belong to no picture")
            _labels(self, names)

    def as_json(self) -> dict[str, Any]:
        """For ``evaluation.json``."""
        networks = self.networks
        classifier = networks.classifier
        return {
            "feature network": str(networks.extractor.identity),
            "perceptual network": str(networks.perceptual.identity),
            "classifier": None if classifier is None else str(classifier.identity),
            "reference": None if self.reference is None else str(self.reference),
            "labels": self.labels,
            "size": self.size,
        }


def score(
    samples: Path,
    truth: Path,
    masks: Path | None,
    names: dict[str, str],
    scoring: Scoring,
    world: World,
    progress: Progress,
    *,
    paired: bool = True,
) -> Scores:
    """Score the pictures in a folder; the same on every process, each looks at a share.

    Args:
        samples, truth, masks, paired: as of ``score_folders``.
        names: name of a truth's file to the name that its class is known by.
        scoring: with what.
        world: this process and the others.
        progress: hears how far it is.

    Raises:
        ValueError: as of ``score_folders``, or a picture has no class.
    """
    return score_folders(
        samples,
        truth,
        reference=scoring.reference,
        masks=masks,
        labels=None if scoring.labels is None else _labels(scoring, names),
        networks=scoring.networks,
        paired=paired,
        size=scoring.size,
        batch_size=scoring.batch_size,
        cache=scoring.cache,
        keep=scoring.keep,
        shard=Shard(world.rank, world.size, world.gather),
        progress=progress,
    )


def _labels(scoring: Scoring, names: dict[str, str]) -> dict[str, int]:
    """Class of each input; a file may call an image by its path or by its last part alone."""
    assert scoring.labels is not None
    plain = {number: plain_name(name) for number, name in names.items()}
    by_folder = scoring.labels == FOLDERS
    known = _by_folder(scoring, plain.values()) if by_folder else read_labels(scoring.labels)
    found = {
        number: known.get(name, known.get(PurePosixPath(name).name))
        for number, name in plain.items()
    }
    lonely = [names[number] for number, label in found.items() if label is None]
    if lonely:
        raise ValueError(
            f"{scoring.labels}: no class of {len(lonely)} inputs, the first is '{lonely[0]}'"
        )
    return {number: label for number, label in found.items() if label is not None}


def _by_folder(scoring: Scoring, names: Collection[str]) -> dict[str, int]:
    folders = scoring.folders or class_folders(names)
    classifier = scoring.networks.classifier
    if classifier is not None and len(folders) != classifier.classes:
        raise ValueError(
            f"labels folders: the pictures lie in {len(folders)} folders, the classifier has "
            f"{classifier.classes} classes; wanted is a folder for each, or a file of labels"
        )
    return labels_of_folders(names, folders)


def write_scores(root: Path, scores: Scores, paper: dict[str, Any] | None) -> None:
    """Write ``scores.json``, with a value for each image, and the same as a table."""
    content = json.loads(scores.to_json(per_image=True))
    write_json(root / SCORES, {**content, "paper": paper})
    _durable.write_text(root / TABLE, scores.table())
