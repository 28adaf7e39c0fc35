"""Line charts as SVG inside a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from palette._html import Html, digits, escape, tag

Points = Sequence[tuple[float, float | None]]
"""(x, y); None is a gap."""

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 8, 8, 26
_MOST = 400  # points drawn of a line; of each stretch its lowest and its highest value
_TINY, _HUGE = 1e-300, 1e300  # beyond, the arithmetic of an axis has no room
_COLOURS = ("var(--accent)", "var(--second)")


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    points: Points
    faint: bool = False
    """Drawn behind the others, in grey."""
    dots: bool = False
    """Few values: each is marked."""


class _Scale:
    """From values to pixels along one axis."""

    def __init__(self, values: Iterable[float], start: float, end: float, *, log: bool) -> None:
        found = list(values)
        low, high = min(found), max(found)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1), high + abs(high))
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self._start + (self._end - self._start) * (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the range, about ``count`` of them."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) >= 3:
                    return found[:: -(-len(found) // 6)]
        rough = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [round(number * step, 12) for number in numbers]


def line_chart(title: str, lines: Sequence[Line], *, until: float = 0, log: bool = False) -> Html:
    """A chart over optimizer steps; nothing where no line has a value.

    Args:
        title: above the chart, with the unit.
        lines: values that are not finite are gaps, as are those not above 0 with ``log``.
        until: the last step; the x axis reaches from 0 to it, or to the last point.
        log: a logarithmic y axis.
    """
    drawn = [line._replace(points=_shown(line.points, log=log)) for line in lines]
    drawn = [line for line in drawn if any(y is not None for _, y in line.points)]
    if not drawn:
        return Html("")
    steps = [0, until, *(x for line in drawn for x, _ in line.points)]
    across = _Scale(steps, _LEFT, _WIDTH - _RIGHT, log=False)
    up = _Scale(
        (y for line in drawn for _, y in line.points if y is not None),
        _HEIGHT - _BOTTOM,
        _TOP,
        log=log,
    )
    parts = [_grid(across, up)]
    colours = _colours(drawn)
    for line, colour in sorted(
        zip(drawn, colours, strict=True), key=lambda pair: not pair[0].faint
    ):
        parts += _drawn(line, colour, across, up)
    legend = [
        tag("span", tag("i", style=f"color: {colour}"), f"{line.name} {_last(line)}")
        for line, colour in zip(drawn, colours, strict=True)
    ]
    svg = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} over optimizer steps",
    )
    return tag("div", tag("h3", title), svg, tag("div", *legend, class_="key"), class_="chart")


def _shown(points: Points, *, log: bool) -> list[tuple[float, float | None]]:
    """Points that can be drawn, thinned out."""
    kept = [(x, _drawable(y, log=log)) for x, y in points]
    size = -(-len(kept) // (_MOST // 2))
    if size < 3:
        return kept
    thin: list[tuple[float, float | None]] = []
    for start in range(0, len(kept), size):
        stretch = [(x, y) for x, y in kept[start : start + size] if y is not None]
        if not stretch:
            thin.append((kept[start][0], None))
            continue
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        thin += sorted(ends)
    return thin


def _drawable(y: float | None, *, log: bool) -> float | None:
    low = _TINY if log else -_HUGE
    return y if y is not None and low <= y <= _HUGE else None


def _drawn(line: Line, colour: str, across: _Scale, up: _Scale) -> list[Html]:
    """A line in its unbroken stretches."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((across(x), up(y)))
    parts = []
    for stretch in filter(None, stretches):
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
        parts.append(Html(f'<polyline points="{corners}" stroke="{colour}"/>'))
        if line.dots or len(stretch) == 1:
            dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in stretch)
            parts.append(Html(f'<g fill="{colour}">{"".join(dots)}</g>'))
    return parts


def _grid(across: _Scale, up: _Scale) -> Html:
    floor = _HEIGHT - _BOTTOM
    parts = []
    for value in up.ticks(5):
        y = f"{up(value):.1f}"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{escape(_tick(value))}</text>'
        )
    parts += [
        f'<text x="{across(value):.1f}" y="{floor + 18}" text-anchor="middle">'
        f"{escape(_tick(value))}</text>"
        for value in across.ticks(5)
    ]
    return Html("".join(parts))


def _tick(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def _colours(lines: Sequence[Line]) -> list[str]:
    clear = sum(not line.faint for line in lines)
    found, place = [], 0
    for line in lines:
        if line.faint:
            found.append("var(--faint)")
            continue
        hue = 230 - 210 * place / max(clear - 1, 1)
        found.append(_COLOURS[place] if clear <= len(_COLOURS) else f"hsl({hue:.0f} 60% 52%)")
        place += 1
    return found


def _last(line: Line) -> str:
    return digits(next(y for _, y in reversed(line.points) if y is not None))
