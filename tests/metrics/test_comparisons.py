"""KID, precision and recall, inception score and accuracy, against plain loops; what is kept."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import torch
from torch import Tensor

from palette.metrics import kernel
from palette.metrics.inception_score import InceptionScore, hits
from palette.metrics.kept import Kept
from palette.metrics.manifold import precision_recall


def _rows(count: int, dim: int, seed: int, offset: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(offset, 1, size=(count, dim)))


def _discrepancy(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Unbiased squared MMD, term by term."""
    n, dim = x.shape

    def k(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        return float((np.sum(a * b) / dim + 1) ** 3)

    within = sum(
        math.fsum(k(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j)
        for rows in (x, y)
    )
    between = math.fsum(k(a, b) for a in x for b in y)
    return within / (n * (n - 1)) - 2 * between / (n * n)


def test_kid_of_whole_sets() -> None:
    x, y = _rows(30, 5, 1), _rows(30, 5, 2, 0.7)
    found = kernel.kernel_distance(x, y)
    assert (found.subsets, found.subset_size, found.deviation) == (1, 30, 0)
    assert found.mean == pytest.approx(_discrepancy(x.numpy(), y.numpy()), rel=1e-10)


def test_kid_of_subsets() -> None:
    x, y = _rows(40, 6, 3), _rows(55, 6, 4, 0.5)
    found = kernel.kernel_distance(x, y, subsets=4, subset_size=20)
    values = [
        _discrepancy(
            x[kernel.subset(40, 20, number, 0)].numpy(), y[kernel.subset(55, 20, number, 1)].numpy()
        )
        for number in range(4)
    ]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-10)
    assert found.deviation == pytest.approx(np.std(values), rel=1e-8)


def test_kid_subsets_are_without_replacement_and_differ() -> None:
    draws = [(number, side) for number in range(5) for side in (0, 1)]
    drawn = {tuple(kernel.subset(50, 20, *which).tolist()) for which in draws}
    assert len(drawn) == 10
    assert all(len(set(places)) == 20 and max(places) < 50 for places in drawn)
    often = torch.bincount(torch.cat([kernel.subset(50, 20, n, 0) for n in range(500)]))
    assert scipy.stats.chisquare(often.numpy()).pvalue > 1e-3


def test_kid_is_unbiased() -> None:
    """Two sets from one distribution: zero within its own deviation."""
    found = kernel.kernel_distance(
        _rows(1500, 8, 5), _rows(1500, 8, 6), subsets=20, subset_size=300
    )
    assert abs(found.mean) < 2 * found.deviation


def test_precision_and_recall_against_loops() -> None:
    samples, real = _rows(60, 2, 7, 0.8).numpy(), _rows(50, 2, 8).numpy()

    def covered(points: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]) -> float:
        inside = 0
        for point in points:
            for number, centre in enumerate(centres):
                others = np.delete(centres, number, axis=0)
                radius = np.sort(np.linalg.norm(others - centre, axis=1))[2]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    found = precision_recall(torch.from_numpy(samples), torch.from_numpy(real))
    assert found.precision == covered(samples, real)
    assert found.recall == covered(real, samples)
    assert 0.2 < found.precision < 1
    assert 0.2 < found.recall < 1


def test_precision_and_recall_of_special_sets() -> None:
    x = _rows(2100, 3, 9)  # more than a block
    assert precision_recall(x, x.flip(0)) == (1, 1)
    assert precision_recall(x[:100], x[:100] + 1000) == (0, 0)
    same = torch.full((6, 4), 0.3, dtype=torch.float32)  # all radii are 0
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, same + 1e-3) == (0, 0)
    one_mode = torch.cat([_rows(50, 3, 10) * 0.01])
    both = precision_recall(one_mode, _rows(50, 3, 11))
    assert both.precision == 1
    assert both.recall < 0.5


@pytest.mark.parametrize("function", [kernel.kernel_distance, precision_recall])
def test_too_few_rows_or_other_features(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must have"):
        function(_rows(1, 3, 1), _rows(9, 3, 2))
    with pytest.raises(ValueError, match="must have"):
        function(_rows(9, 3, 1), _rows(1, 3, 2))
    with pytest.raises(ValueError, match="features"):
        function(_rows(9, 3, 1), _rows(9, 4, 2))


def _chances(count: int, classes: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([0.3] * classes, count))


def _inception_score(p: npt.NDArray[np.float64]) -> float:
    return float(np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p])))


def test_inception_score() -> None:
    p = _chances(57, 12, 12)
    p[3] = 0
    p[3, 4] = 1  # certainty: 0 log 0 is 0
    score = InceptionScore(12)
    for part in torch.split(torch.arange(57), 8):
        score.update(p[part], part)
    found = score.compute()
    values = [_inception_score(p[split::10].numpy()) for split in range(10)]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-10)
    assert found.deviation == pytest.approx(np.std(values), rel=1e-8)
    assert found.whole == pytest.approx(_inception_score(p.numpy()), rel=1e-10)
    assert found.splits == 10


def test_inception_score_of_shards_and_extremes() -> None:
    p, numbers = _chances(41, 5, 13), torch.arange(41)
    whole, merged = InceptionScore(5), InceptionScore(5)
    whole.update(p, numbers)
    for rank in range(3):
        part = InceptionScore(5)
        part.update(p[rank::3].flip(0), numbers[rank::3].flip(0))
        merged.merge(part)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert merged.count == 41

    certain = InceptionScore(4, splits=1)
    certain.update(torch.eye(4), torch.arange(4))
    assert certain.compute().mean == pytest.approx(4, rel=1e-12)
    unsure = InceptionScore(4, splits=1)
    unsure.update(torch.full((9, 4), 0.25), torch.arange(9))
    assert unsure.compute().mean == 1
    one = InceptionScore(4)
    one.update(torch.full((1, 4), 0.25), torch.tensor([17]))
    assert one.compute() == (1, 0, 1, 1)


def test_inception_score_refuses_what_is_no_probability() -> None:
    score = InceptionScore(3)
    with pytest.raises(ValueError, match=r"must have shape \[N, 3\], got \[2, 4\]"):
        score.update(torch.ones(2, 4) / 4, torch.arange(2))
    for wrong in (torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[0.1, 0.1, 0.1]])):
        with pytest.raises(ValueError, match="sum to 1"):
            score.update(wrong, torch.arange(1))
    with pytest.raises(ValueError, match="sum to 1"):
        score.update(torch.tensor([[0.5, torch.nan, 0.5]]), torch.arange(1))
    with pytest.raises(ValueError, match="no images"):
        score.compute()
    with pytest.raises(ValueError, match="other has 4 classes"):
        score.merge(InceptionScore(4))


def test_accuracy() -> None:
    p = _chances(20, 6, 14)
    labels = torch.arange(20) % 6
    assert hits(p, labels).tolist() == (p.numpy().argmax(1) == labels.numpy()).tolist()
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.5, got 6"):
        hits(p[:1], torch.tensor([6]))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.5, got -1"):
        hits(p[:1], torch.tensor([-1]))


def test_kept_is_the_same_for_any_order_batch_and_shards() -> None:
    rows, numbers = _rows(200, 3, 15), torch.arange(200) * 7
    reference = Kept(3, 40)
    reference.update(rows, numbers)
    order = torch.from_numpy(np.random.default_rng(16).permutation(200))
    other = Kept(3, 40)
    for part in torch.split(order, 13):
        other.update(rows[part], numbers[part])
    merged = Kept(3, 40)
    for rank in range(4):
        shard = Kept(3, 40)
        shard.update(rows[rank::4], numbers[rank::4])
        merged.merge(shard)
    for kept in (reference, other, merged):
        assert len(kept) == 40
        assert np.array_equal(kept.indices, reference.indices)
        assert torch.equal(kept.rows, rows[torch.from_numpy(kept.indices) // 7])
    assert reference.nbytes == 40 * 3 * 8


def test_kept_chooses_evenly() -> None:
    kept = Kept(1, 1000)
    kept.update(torch.zeros(10_000, 1), torch.arange(10_000))
    parts = np.bincount(kept.indices // 1000, minlength=10)
    assert scipy.stats.chisquare(parts).pvalue > 1e-3


def test_kept_below_the_limit_and_precision() -> None:
    kept = Kept(2, 100)
    kept.update(_rows(3, 2, 17).float(), torch.tensor([5, 1, 3]))
    assert kept.rows.dtype == torch.float32
    kept.update(_rows(90, 2, 18), torch.arange(10, 100))
    assert kept.rows.dtype == torch.float64
    assert kept.indices.tolist() == [1, 3, 5, *range(10, 100)]
    with pytest.raises(ValueError, match="other keeps 50 x 2"):
        kept.merge(Kept(2, 50))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Kept(2, 0)
