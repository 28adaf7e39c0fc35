from __future__ import annotations

import math
import re

import pytest

from palette._charts import Line, Points, line_chart


def corners(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'points="([^"]*)"', chart)
    ]


def labels(chart: str, anchor: str) -> list[float]:
    return [float(text) for text in re.findall(rf'anchor="{anchor}">([^<]*)<', chart)]


def test_points_lie_where_the_axes_say() -> None:
    chart = line_chart("x", [Line("x", [(0, 10.0), (50, 20.0), (100, 30.0)])])
    assert corners(chart) == [[(54.0, 214.0), (283.0, 111.0), (512.0, 8.0)]]
    assert labels(chart, "middle") == [0, 20, 40, 60, 80, 100]
    assert labels(chart, "end") == [10, 15, 20, 25, 30]


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios() -> None:
    chart = line_chart("x", [Line("x", [(0, 1e-4), (1, 1e-2), (2, 1.0)])], log=True)
    assert [y for _, y in corners(chart)[0]] == [214.0, 111.0, 8.0]
    assert labels(chart, "end") == [1e-4, 1e-3, 1e-2, 1e-1, 1]


def test_gaps_break_a_line_and_single_points_are_dots() -> None:
    points: Points = [(1, 1.0), (2, 2.0), (3, None), (4, math.nan), (5, 3.0), (6, math.inf)]
    chart = line_chart("x", [Line("x", points)], until=10)
    assert [len(stretch) for stretch in corners(chart)] == [2, 1]
    assert chart.count("<circle") == 1
    assert max(labels(chart, "middle")) == 10


def test_a_long_line_keeps_its_extremes() -> None:
    points = [(float(step), math.sin(step / 5000)) for step in range(100_000)]
    points[12_345], points[67_890] = (12_345, 40.0), (67_890, -30.0)
    (stretch,) = corners(line_chart("x", [Line("x", points)]))
    assert len(stretch) <= 400
    assert {y for _, y in stretch} >= {8.0, 214.0}
    assert [x for x, _ in stretch] == sorted(x for x, _ in stretch)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [5.0],
        [1e-4] * 3,
        [1e-300, 1e300],
        [1.0, 1.0 + 2e-16],
        [5e-324, 1.0],
        [1.7e308, -1.7e308, 1.0],
    ],
)
def test_any_values_have_a_chart(values: list[float], log: bool) -> None:
    chart = line_chart("x", [Line("x", [(float(i), y) for i, y in enumerate(values)])], log=log)
    for stretch in corners(chart):
        assert all(54 <= x <= 512 and 8 <= y <= 214 for x, y in stretch)
    assert 1 <= len(labels(chart, "end")) <= 12


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("x", []) == ""
    assert line_chart("x", [Line("x", [(1, None)]), Line("y", [])]) == ""
    assert line_chart("x", [Line("x", [(1, 0.0), (2, -1.0)])], log=True) == ""


def test_names_are_text() -> None:
    chart = line_chart("<b>", [Line("<i>", [(0, 1.0)])])
    assert "<b>" not in chart
    assert "<i>" not in chart
