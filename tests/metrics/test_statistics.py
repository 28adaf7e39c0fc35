"""Statistics of a reference: merged, cached by what they are about, never confused."""

from __future__ import annotations

import dataclasses
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from palette.metrics import cache
from palette.metrics.frechet import frechet_distance
from palette.metrics.networks import Identity
from palette.metrics.statistics import FeatureStatistics

NETWORK = Identity("a network", "ab" * 32)


def _rows(count: int, dim: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(count).normal(size=(count, dim)))


def _statistics(rows: Tensor, numbers: Tensor, keep: int = 50) -> FeatureStatistics:
    statistics = FeatureStatistics(NETWORK, rows.shape[1], keep)
    statistics.update(rows, numbers)
    return statistics


def _alike(first: FeatureStatistics, second: FeatureStatistics) -> bool:
    return (
        first.count == second.count
        and frechet_distance(first.gaussian, second.gaussian) < 1e-12
        and np.array_equal(first.kept.indices, second.kept.indices)
        and torch.equal(first.kept.rows, second.kept.rows)
    )


@pytest.mark.parametrize("size", [1, 2, 5])
def test_gathered_from_processes(size: int, in_processes: Callable[..., list[Any]]) -> None:
    rows, numbers = _rows(333), torch.arange(333)
    whole = _statistics(rows, numbers)

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[FeatureStatistics, int]:
        mine = _statistics(rows[rank::size], numbers[rank::size])
        return mine.gathered(gather), len(mine.kept)

    found = in_processes(size, work)
    assert all(_alike(statistics, whole) for statistics, _ in found)
    assert sum(kept for _, kept in found) == 50  # no process sends features that nobody needs
    assert torch.equal(found[0][0].gaussian.factor, found[-1][0].gaussian.factor)


def test_merging() -> None:
    rows = _rows(90)
    merged = _statistics(rows[40:], torch.arange(40, 90))
    merged.merge(_statistics(rows[:40], torch.arange(40)))
    assert _alike(merged, _statistics(rows, torch.arange(90)))
    assert 89 in merged
    assert 90 not in merged


def test_an_image_counts_once() -> None:
    statistics = _statistics(_rows(10), torch.arange(10))
    with pytest.raises(ValueError, match="image 9 would count twice"):
        statistics.update(_rows(2), torch.tensor([10, 9]))
    with pytest.raises(ValueError, match="image 3 would count twice"):
        statistics.merge(_statistics(_rows(1), torch.tensor([3])))
    with pytest.raises(ValueError, match="would count twice"):
        statistics.update(_rows(2), torch.tensor([20, 20]))
    with pytest.raises(ValueError, match="indices: 2 numbers for 3 images"):
        statistics.update(_rows(3), torch.arange(30, 32))
    assert statistics.count == 10


def test_networks_are_never_mixed() -> None:
    other = FeatureStatistics(Identity("a network", "cd" * 32), 6)
    with pytest.raises(ValueError, match=r"cannot be compared: 'a network \[abab.*' and 'a netw"):
        _statistics(_rows(3), torch.arange(3)).merge(other)
    with pytest.raises(ValueError, match=r"a network \[abab.*\]: rows: features that are not fin"):
        _statistics(torch.full((2, 6), torch.nan), torch.arange(2))


KEY = cache.Key(data="data", network=NETWORK, prepared="as they are", keep=50)


@pytest.mark.parametrize("count", [1, 7, 400])
def test_cache_gives_back_what_was_stored(tmp_path: Path, count: int) -> None:
    statistics = _statistics(_rows(count), torch.arange(count))
    path = cache.store(tmp_path / "new" / "folder", KEY, statistics)
    found = cache.load(tmp_path / "new" / "folder", KEY)
    assert found is not None
    assert found.identity == NETWORK
    assert _alike(found, statistics)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary
    found.update(_rows(5), torch.arange(1000, 1005))
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["mean"].dtype == np.float64


def test_cache_key_is_everything_that_matters(tmp_path: Path) -> None:
    cache.store(tmp_path, KEY, _statistics(_rows(4), torch.arange(4)))
    others = (
        {"data": "other"},
        {"network": Identity("a network", "cd" * 32)},
        {"network": Identity("another", "ab" * 32)},
        {"prepared": "256x256"},
        {"keep": 51},
        {"format": cache.FORMAT + 1},
    )
    for change in others:
        other = dataclasses.replace(KEY, **change)
        assert cache.load(tmp_path, other) is None
        KEY.file(tmp_path).rename(other.file(tmp_path))  # put under the wrong name
        with pytest.warns(UserWarning, match="it is about something else"):
            assert cache.load(tmp_path, other) is None
        other.file(tmp_path).rename(KEY.file(tmp_path))
    assert cache.load(tmp_path, KEY) is not None


def test_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    statistics = _statistics(_rows(40), torch.arange(40))
    path = cache.store(tmp_path, KEY, statistics)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"text", whole[:200] + b"!" + whole[201:]):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged, computed again"):
            assert cache.load(tmp_path, KEY) is None
    arrays = dict(np.load(cache.store(tmp_path, KEY, statistics)))
    for change in (
        {"factor": np.zeros((3, 5))},
        {"kept_rows": np.zeros((3, 6))},
        {"mean": np.zeros((2, 3))},
        {"seen": np.array([object()])},
    ):
        with path.open("wb") as file:
            np.savez(file, **{**arrays, **change})
        with pytest.warns(UserWarning, match="damaged, computed again"):
            assert cache.load(tmp_path, KEY) is None
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with pytest.warns(UserWarning, match="compressed"):
        assert cache.load(tmp_path, KEY) is None
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", b"nothing")
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load(tmp_path, KEY) is None


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written: "):
        cache.store(tmp_path / "file", KEY, _statistics(_rows(4), torch.arange(4)))


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="No space left on device"):
        cache.store(tmp_path, KEY, _statistics(_rows(4), torch.arange(4)))
    assert list(tmp_path.iterdir()) == []


def test_hash_of_files_is_about_contents_and_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode() * 3_000_000)
    names = [str(path) for path in paths]
    first = cache.hash_files(names)
    assert cache.hash_files(names, workers=1) == first
    renamed = paths[2].rename(tmp_path / "other")
    assert cache.hash_files([*names[:2], str(renamed)]) == first
    assert cache.hash_files([names[1], names[0], str(renamed)]) != first
    renamed.write_bytes(b"c" * 2_999_999 + b"d")
    assert cache.hash_files([*names[:2], str(renamed)]) != first
    with pytest.raises(ValueError, match="c: No such file or directory"):
        cache.hash_files(names)


def test_loading_says_nothing_when_all_is_well(tmp_path: Path) -> None:
    cache.store(tmp_path, KEY, _statistics(_rows(4), torch.arange(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(tmp_path, KEY) is not None
