"""What an evaluation left in its folder, read back so far as it is there.

``evaluation.json`` holds the settings, ``names.json`` the inputs' own names by number,
``scores.json`` what :class:`palette.metrics.scores.Scores` writes; ``inputs``, ``truth`` and
``masks`` hold ``NNNNN.png``, ``samples`` holds ``NNNNN_K.png``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from palette.data.paths import printable
from palette.metrics.scores import Score

_SAMPLE = re.compile(r"(\d+)_(\d+)\.png")
_IMAGE = re.compile(r"(?:.*/)?(\d+)(?:_(\d+))?(?:\.\w+)?")


class Ranked(NamedTuple):
    """The value of one picture in one metric."""

    number: str
    copy: int
    value: float


class Results:
    """An evaluation folder.

    Args:
        folder: as ``palette evaluate`` writes it; whatever is optional may be missing.

    Raises:
        ValueError: there are neither samples nor scores, or a JSON file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = _samples(folder / "samples")
        """Number of each input, as in the file names, to its samples by their own number."""
        self.settings = _read(folder / "evaluation.json")
        self.names = _read(folder / "names.json")
        self.scored = _read(folder / "scores.json")
        if not self.samples and not self.scored:
            raise ValueError(
                f"{printable(folder)}: no evaluation; wanted is a folder that palette evaluate "
                "wrote, with samples/NNNNN_K.png or scores.json in it"
            )

    def name(self, number: str) -> str:
        """The input's own name, or its number where that is not known."""
        return str(self.names.get(number, number))

    def picture(self, kind: str, number: str) -> Path:
        """Path of the picture ``kind`` (inputs, truth, masks) of an input; it may not exist."""
        return self.folder / kind / f"{number}.png"

    def has(self, kind: str) -> bool:
        """Whether there are pictures of this kind at all."""
        return next((self.folder / kind).glob("*.png"), None) is not None

    def scores(self) -> list[Score]:
        """The scores, in their order; values that are not numbers are "not a number"."""
        found = []
        scores = part(self.scored, "scores")
        for key in scores:
            facts = part(scores, key)
            better = facts.get("better")
            found.append(
                Score(
                    key=str(key),
                    title=str(facts.get("title", key)),
                    value=_number(facts.get("value")),
                    images=_count(facts.get("images")),
                    uses=str(facts.get("uses") or ""),
                    better=better if better in ("higher", "lower") else "neither",
                    spread=None if facts.get("spread") is None else _number(facts["spread"]),
                    note=str(facts.get("note") or ""),
                )
            )
        return found

    def ranked(self, score: Score) -> list[Ranked]:
        """Pictures and values of a metric of single images, the best first."""
        found = []
        for name, value in part(part(self.scored, "per_image"), score.key).items():
            match = _IMAGE.fullmatch(str(name))
            if match is None or match[1] not in self.samples or math.isnan(_number(value)):
                continue
            copy = int(match[2] or 0)
            if copy in self.samples[match[1]]:
                found.append(Ranked(match[1], copy, _number(value)))
        sign = -1 if score.better == "higher" else 1
        return sorted(found, key=lambda one: (sign * one.value, one.number, one.copy))


def part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping within another; empty where there is none."""
    found = values.get(key)
    return dict(found) if isinstance(found, Mapping) else {}


def listed(values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The mappings of a list within a mapping."""
    found = values.get(key)
    return (
        [dict(item) for item in found if isinstance(item, Mapping)]
        if isinstance(found, list)
        else []
    )


def _samples(folder: Path) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {}
    for name in os.listdir(folder) if folder.is_dir() else []:
        match = _SAMPLE.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = folder / name
    return {
        number: dict(sorted(found[number].items()))
        for number in sorted(found, key=lambda number: (int(number), number))
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{printable(path)}: damaged: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)}: wanted is a JSON object")
    return content


def _number(value: object) -> float:
    """A number, or the strings that strict JSON has for infinite and undefined ones."""
    try:
        return float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
