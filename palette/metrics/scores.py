"""What an evaluation found: every figure with what it was computed with, as table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

Better = Literal["higher", "lower", "neither"]


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure."""

    key: str
    """Name for programs. Scores of the built-in random network end in "_random"."""
    title: str
    """Name for people."""
    value: float
    images: int
    """How many samples it is about (for diversity: inputs)."""
    uses: str
    """Feature network and settings; only scores with the same are comparable."""
    better: Better
    spread: float | None = None
    """Standard deviation over images, splits or subsets."""
    note: str = ""
    """What a reader must know, such as a bias."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """All figures of one evaluation."""

    scores: dict[str, Score]
    absent: dict[str, str]
    """Metrics that were not computed, and why."""
    protocol: dict[str, str | int]
    """What was compared with what: counts, hashes, resizing, networks."""
    per_image: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    """Of metrics that belong to single images: image number to value."""
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    """Image number to name, where known."""
    inputs: dict[int, str] = dataclasses.field(default_factory=dict)
    """Number of an input to its name, for the metrics of inputs: the diversities."""

    def __getitem__(self, key: str) -> Score:
        """A figure by its key. Raises KeyError that says why it is absent."""
        if key not in self.scores:
            reason = self.absent.get(key, f"there are {', '.join(self.scores) or 'none'}")
            raise KeyError(f"{key}: {reason}")
        return self.scores[key]

    def table(self) -> str:
        """All figures as text, with what they used, what is absent, and the protocol."""
        uses = list(dict.fromkeys(s.uses for s in self.scores.values() if s.uses))
        rows: list[tuple[str, ...]] = [("metric", "value", "+-", "images", "", "note")]
        rows += [_row(s, uses.index(s.uses) + 1 if s.uses else 0) for s in self.scores.values()]
        blocks = [_aligned(rows)]
        blocks.append("\n".join(f"[{number}] {text}" for number, text in enumerate(uses, 1)))
        if any(key.endswith("_random") for key in self.scores):
            blocks.insert(0, STAND_IN)
        blocks.append("\n".join(f"not computed: {k}: {why}" for k, why in self.absent.items()))
        blocks.append("\n".join(f"{name}: {value}" for name, value in self.protocol.items()))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_json(self, *, per_image: bool = False) -> str:
        """All of it as strict JSON: infinite and undefined values are the strings "inf", "nan"."""
        content: dict[str, Any] = {
            "scores": {key: _plain(dataclasses.asdict(s)) for key, s in self.scores.items()},
            "absent": self.absent,
            "protocol": self.protocol,
        }
        if any(key.endswith("_random") for key in self.scores):
            content["warning"] = STAND_IN
        if per_image:
            content["per_image"] = {
                key: {self._name(key, i): _number(v) for i, v in values.items()}
                for key, values in self.per_image.items()
            }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _name(self, key: str, number: int) -> str:
        known = self.inputs if key.startswith("diversity") else self.names
        return known.get(number, str(number))


STAND_IN = (
    "Scores named ..._random use the built-in network with fixed random weights. They are not FID, "
    "KID, PD, LPIPS, precision or recall of the literature; compare them with nothing but each "
    "other."
)


def side_by_side(columns: Mapping[str, Scores]) -> str:
    """Table of several evaluations, one column each, as of raw and averaged weights.

    Raises:
        ValueError: two of them computed the same metric with different networks or settings.
    """
    keys = list(dict.fromkeys(key for scores in columns.values() for key in scores.scores))
    for key in keys:
        used = {name: s.scores[key].uses for name, s in columns.items() if key in s.scores}
        first = next(iter(used))
        for name, uses in used.items():
            if uses != used[first]:
                raise ValueError(
                    f"{key} cannot be compared: '{first}' used {used[first]}; '{name}' used {uses}"
                )
    rows: list[tuple[str, ...]] = [("metric", *columns)]
    for key in keys:
        values = (scores.scores.get(key) for scores in columns.values())
        rows.append((key, *("-" if score is None else _digits(score.value) for score in values)))
    return _aligned(rows) + "\n"


def _row(score: Score, uses: int) -> tuple[str, ...]:
    spread = "" if score.spread is None else _digits(score.spread)
    mark = f"[{uses}]" if uses else ""
    return (score.title, _digits(score.value), spread, str(score.images), mark, score.note)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in (0, len(widths) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _digits(value: float) -> str:
    return f"{value:.6g}"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _number(v) if isinstance(v, float) else v for k, v in values.items()}
