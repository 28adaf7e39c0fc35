"""FID against independent computations, at any rank, in any order, in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from palette.metrics.frechet import Gaussian, frechet_distance


def _rows(count: int, dim: int, seed: int, *, spread: float = 0.0) -> Tensor:
    """Correlated rows, not centred; standard deviations fall by 10^-spread over the features."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(dim, dim)) / np.sqrt(dim)
    scales = 10.0 ** np.linspace(0, -spread, dim)
    return torch.from_numpy(
        (draw.normal(size=(count, dim)) * scales) @ mixing + draw.normal(size=dim)
    )


def _gaussian(rows: Tensor, batch: int | None = None) -> Gaussian:
    gaussian = Gaussian(rows.shape[1])
    for part in torch.split(rows, batch or len(rows)):
        gaussian.update(part)
    return gaussian


def _by_matrix_root(x: Tensor, y: Tensor) -> float:
    """The usual way: covariances and SciPy's square root of their product."""
    a, b = x.numpy(), y.numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    means = a.mean(0) - b.mean(0)
    return float(means @ means + np.trace(first + second - 2 * root))


def _by_svd(x: Tensor, y: Tensor) -> float:
    """From the centred rows themselves: right for any number of them."""
    a, b = x.numpy(), y.numpy()
    centred = [(rows - rows.mean(0)) / np.sqrt(max(len(rows) - 1, 1)) for rows in (a, b)]
    common = scipy.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = a.mean(0) - b.mean(0)
    return float(means @ means + sum((c**2).sum() for c in centred) - 2 * common)


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_equals_the_matrix_square_root(dim: int) -> None:
    x, y = _rows(500, dim, 1), _rows(400, dim, 2)
    if dim == 1:
        expected = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    else:
        expected = _by_matrix_root(x, y)
    assert frechet_distance(_gaussian(x), _gaussian(y)) == pytest.approx(expected, rel=1e-6)


def test_equals_the_matrix_square_root_after_folding() -> None:
    x, y = _rows(1400, 260, 3), _rows(1300, 260, 4)
    found = frechet_distance(_gaussian(x, 77), _gaussian(y, 400))
    assert found == pytest.approx(_by_matrix_root(x, y), rel=1e-9)
    assert found == pytest.approx(_by_svd(x, y), rel=1e-9)


@pytest.mark.parametrize("counts", [(1, 1), (1, 40), (2, 3), (20, 30), (64, 65), (40, 900)])
def test_fewer_images_than_features(counts: tuple[int, int]) -> None:
    x, y = _rows(counts[0], 64, 5), _rows(counts[1], 64, 6)
    first, second = _gaussian(x), _gaussian(y)
    found = frechet_distance(first, second)
    assert abs(found - _by_svd(x, y)) <= 1e-9 * max(first.trace + second.trace, found)


@pytest.mark.parametrize("count", [1, 2, 50, 300, 700])
def test_identical_sets(count: int) -> None:
    x = _rows(count, 300, 7)
    first, second = _gaussian(x), _gaussian(x.flip(0), 9)
    assert frechet_distance(first, first) <= 1e-12 * max(first.trace, 1)
    assert frechet_distance(first, second) <= 1e-12 * max(first.trace, 1)


@pytest.mark.parametrize(
    ("rank", "spread"), [(300, 0.0), (300, 7.0), (250, 0.0), (3, 0.0), (300, 12.0)]
)
def test_known_in_closed_form_whatever_the_rank(rank: int, spread: float) -> None:
    """Of X and c X + d the distance is |mean difference|^2 + (1 - c)^2 tr C."""
    x = _rows(1500, 300, 8, spread=spread)
    x[:, rank:] = 0.25  # features that never vary
    shift = torch.linspace(-1, 1, 300, dtype=torch.float64)
    first, second = _gaussian(x, 100), _gaussian((3 * x + shift).flip(0), 333)
    apart = (2 * x.mean(0) + shift).square().sum()
    expected = float(apart + 4 * x.var(0).sum())
    found = frechet_distance(first, second)
    assert abs(found - expected) <= 1e-11 * (first.trace + second.trace + float(apart))


def test_equal_images_and_disjoint_subspaces() -> None:
    x = torch.zeros(600, 300, dtype=torch.float64)
    y = torch.zeros(600, 300, dtype=torch.float64)
    x[:, :100], y[:, 200:] = _rows(600, 100, 9), _rows(600, 100, 10)
    x[300:] = x[:300]
    first, second = _gaussian(x), _gaussian(y)
    apart = float((x.mean(0) - y.mean(0)).square().sum())
    expected = apart + first.trace + second.trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_far_from_the_origin() -> None:
    """Sums of squares would lose everything here."""
    x, y = _rows(2000, 20, 11), _rows(2000, 20, 12)
    near = frechet_distance(_gaussian(x, 64), _gaussian(y, 64))
    far = frechet_distance(_gaussian(x + 1e6, 64), _gaussian(y + 1e6, 64))
    assert far == pytest.approx(near, rel=1e-7)


@pytest.mark.parametrize(("count", "dim"), [(1200, 280), (150, 280)])
def test_batches_order_and_shards_do_not_matter(count: int, dim: int) -> None:
    x = _rows(count, dim, 13, spread=2)
    reference = _gaussian(_rows(900, dim, 14, spread=2))
    expected = frechet_distance(_gaussian(x), reference)
    order = torch.from_numpy(np.random.default_rng(15).permutation(count))
    for batch in (1, 7, 256, count):
        assert frechet_distance(_gaussian(x, batch), reference) == expected  # to the last bit
        shuffled = frechet_distance(_gaussian(x[order], batch), reference)
        assert shuffled == pytest.approx(expected, rel=1e-9)
    for shards in (2, 3, 8):
        whole = Gaussian(dim)
        for rank in range(shards):
            whole.merge(_gaussian(x[rank::shards], 16))
        assert whole.count == count
        assert frechet_distance(whole, reference) == pytest.approx(expected, rel=1e-9)


def test_merging_with_nothing_and_restoring() -> None:
    x = _rows(700, 30, 16)
    gaussian = _gaussian(x)
    before = (gaussian.mean.clone(), gaussian.trace)
    gaussian.merge(Gaussian(30))
    empty = Gaussian(30)
    empty.merge(gaussian)
    again = Gaussian.of(gaussian.count, gaussian.mean, gaussian.factor)
    for other in (gaussian, empty, again):
        assert other.count == 700
        assert torch.equal(other.mean, before[0])
        assert other.trace == before[1]
    more = _rows(50, 30, 17)
    again.update(more)
    assert again.count == 750
    assert torch.allclose(again.mean, torch.cat([x, more]).mean(0), rtol=1e-12)


def test_covariance_is_numpys() -> None:
    x = _rows(900, 40, 18)
    factor = _gaussian(x, 50).factor
    covariance = factor.T @ factor / 899
    assert np.allclose(covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-13)


def test_memory_does_not_grow_with_images() -> None:
    gaussian = Gaussian(300)
    for seed in range(12):
        gaussian.update(_rows(299, 300, seed).to(torch.float32))
        assert gaussian.nbytes <= 2 * 300 * 300 * 8 + 300 * 8


def test_peak_memory_of_a_process() -> None:
    """20,000 x 512 float64 features are 82 MB; the process grows by a few matrices of 512 x 512."""
    program = """
import resource, torch
from palette.metrics.frechet import Gaussian, frechet_distance
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm = Gaussian(512)
warm.update(torch.randn(1100, 512))
frechet_distance(warm, warm)
before, gaussian = peak(), Gaussian(512)
for _ in range(200):
    gaussian.update(torch.randn(100, 512))
frechet_distance(gaussian, warm)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 * 2**20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 5), r"rows must have shape \[N, 4\], got \[3, 5\]"),
        (torch.zeros(4), r"rows must have shape \[N, 4\], got \[4\]"),
        (torch.tensor([[0.0, 1.0, torch.nan, 0.0]]), "not finite"),
        (torch.tensor([[0.0, 1.0, torch.inf, 0.0]]), "not finite"),
    ],
)
def test_wrong_rows(rows: Tensor, message: str) -> None:
    gaussian = Gaussian(4)
    with pytest.raises(ValueError, match=message):
        gaussian.update(rows)
    assert gaussian.count == 0


def test_nothing_to_compare() -> None:
    full = _gaussian(_rows(5, 4, 19))
    with pytest.raises(ValueError, match="second: no images"):
        frechet_distance(full, Gaussian(4))
    with pytest.raises(ValueError, match="second has 3 features, first has 4"):
        frechet_distance(full, Gaussian(3))
    with pytest.raises(ValueError, match="other has 3 features"):
        full.merge(Gaussian(3))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        Gaussian(0)
