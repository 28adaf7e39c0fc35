"""Beyond the border of a picture."""

from __future__ import annotations

import pytest

from palette.data.canvas import beyond, windows


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom", "all"])
def test_half_of_the_result_is_new(side: str) -> None:
    left, top, right, bottom = beyond((300, 400), side)
    assert (right - left) * (bottom - top) == pytest.approx(2 * 300 * 400, rel=0.01)
    moved = {"left": left < 0, "top": top < 0, "right": right > 400, "bottom": bottom > 300}
    assert all(moved.values()) if side == "all" else [k for k in moved if moved[k]] == [side]


def test_so_far_beyond() -> None:
    assert beyond((10, 20), "left", 0.25) == (-5, 0, 20, 10)
    assert beyond((10, 20), "all", 0.5) == (-10, -5, 30, 15)
    assert beyond((10, 20), "bottom", 1e-9) == (0, 0, 20, 11)
    with pytest.raises(ValueError, match="side: found 'up', wants one of left, right"):
        beyond((10, 20), "up")
    with pytest.raises(ValueError, match="by: found 0, wants a number above 0"):
        beyond((10, 20), "all", 0)


def test_windows_of_the_paper_s_panorama() -> None:
    pieces = list(windows(256, 2304, 256))
    assert pieces == [("right", 128, 128), ("left", 128, 128)] * 8


@pytest.mark.parametrize("start", [1, 10, 47, 300])
@pytest.mark.parametrize("wanted", [301, 444])
def test_windows_reach_any_width(start: int, wanted: int) -> None:
    width, added = start, {"left": 0, "right": 0}
    for side, seen, new in windows(start, wanted, 48):
        assert 1 <= new <= 24
        assert 1 <= seen <= width
        assert seen + new <= 48 or start < 24
        width += new
        added[side] += new
    assert width == wanted
    assert 0 <= added["right"] - added["left"] <= 1
