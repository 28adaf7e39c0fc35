"""Seeds, the order of an epoch and the draws of a sample are functions of numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from palette.data.order import Draws, permute, position_to_index, sample_seed, sample_seeds
from palette.ops.philox import philox4x32

FROZEN_SEEDS = [-3464017671761472327, 6718491748864868512]
FROZEN_ORDER = [9, 3, 0, 8, 2, 4, 6, 7, 1, 5]
FROZEN_SPARE = [5, 0, 1, 9, 3, 2, 8, 6, 7, 4]
FROZEN_WORDS = [1782472103, 2481667457, 3426297339, 4246002879, 3281286621]


def test_sample_seed_is_the_first_two_words_of_philox() -> None:
    run_seed, epoch, index = 0x1234_5678_9ABC, 7, 2**33 + 5
    low, high, _, _ = philox4x32((5, 2, epoch, 0x5EED), (run_seed & 0xFFFFFFFF, run_seed >> 32))
    seed = sample_seed(run_seed, epoch, index)
    assert seed % 2**64 == low + (high << 32)
    assert -(2**63) <= seed < 2**63


def test_values_never_change() -> None:
    """A resumed run of an older version must see the same samples."""
    assert sample_seeds(0, 0, [0, 1]).tolist() == FROZEN_SEEDS
    assert permute(0, 0, np.arange(10), 10).tolist() == FROZEN_ORDER
    assert permute(0, 0, np.arange(10), 10, spare=True).tolist() == FROZEN_SPARE
    assert Draws(0).words(5) == FROZEN_WORDS


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_any_seed_is_taken(seed: int) -> None:
    assert len(set(sample_seeds(seed, 0, np.arange(1000)).tolist())) == 1000
    assert sorted(permute(seed, 0, np.arange(33), 33)) == list(range(33))
    assert 0 < Draws(seed).real() < 1


def test_samples_have_different_seeds() -> None:
    seeds = {
        sample_seed(run_seed, epoch, index)
        for run_seed in range(10)
        for epoch in range(10)
        for index in range(10)
    }
    assert len(seeds) == 1000


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_every_epoch_is_a_permutation(length: int) -> None:
    for epoch in range(3):
        order = permute(3, epoch, np.arange(length), length)
        assert sorted(order.tolist()) == list(range(length))


def test_order_of_any_length_takes_no_memory() -> None:
    length = 10**15
    positions = np.concatenate((np.arange(500), length - 1 - np.arange(500)))
    order = permute(0, 0, positions, length)
    assert len(set(order.tolist())) == 1000
    assert order.min() >= 0
    assert order.max() < length


def test_positions_alone_and_together_are_the_same() -> None:
    order = permute(5, 2, np.arange(50), 50)
    assert [position_to_index(5, 2, position, 50) for position in range(50)] == order.tolist()


@pytest.mark.parametrize("length", [2, 3, 7, 10])
def test_every_index_comes_equally_often_at_every_position(length: int) -> None:
    epochs = 3000
    counts = np.zeros((length, length))
    for epoch in range(epochs):
        counts[np.arange(length), permute(11, epoch, np.arange(length), length)] += 1
    expected = epochs / length
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_together() -> None:
    length, together = 100, 0
    for epoch in range(300):
        order = permute(1, epoch, np.arange(length), length)
        together += int((np.abs(np.diff(order)) == 1).sum())
    assert together / 300 == pytest.approx(2 * (length - 1) / length, abs=0.3)


def test_the_spare_order_is_another_one() -> None:
    order, spare = (permute(0, 0, np.arange(99), 99, spare=spare) for spare in (False, True))
    assert sorted(spare) == sorted(order)
    assert (order == spare).sum() < 10


@pytest.mark.parametrize("positions", [[-1], [10], [0, 3, 12]])
def test_positions_outside_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"positions must lie in 0\.\.9"):
        permute(0, 0, positions, 10)


def test_draws_are_words_of_philox_in_order() -> None:
    seed, layer = 0x1_0000_0002, 9
    expected = [
        int(word) for block in range(3) for word in philox4x32((block, 0, 6, layer), (2, 1))
    ]
    draws = Draws(seed, layer=layer)
    assert draws.words(5) + draws.words(1) + draws.words(0) + draws.words(6) == expected


def test_draws_made_together_equal_those_made_alone() -> None:
    seeds = [3, -4, 2**62]
    for seed, draws in zip(seeds, Draws.many(seeds, layer=1, ahead=6), strict=True):
        assert draws.words(30) == Draws(seed, layer=1).words(30)


def test_layers_and_streams_are_independent() -> None:
    sequences = {
        tuple(Draws(1, stream, layer).words(4)) for stream in range(4) for layer in range(4)
    }
    assert len(sequences) == 16


def test_uniform_numbers() -> None:
    values = Draws(2).uniform(20000)
    assert values.min() > 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert values.var() == pytest.approx(1 / 12, abs=0.002)


def test_normal_numbers() -> None:
    values = Draws(2).normal(20001)
    assert values.shape == (20001,)
    assert values.mean() == pytest.approx(0, abs=0.03)
    assert values.std() == pytest.approx(1, abs=0.02)
    assert (values**4).mean() == pytest.approx(3, abs=0.2)
    assert np.corrcoef(values[:-1:2], values[1::2])[0, 1] == pytest.approx(0, abs=0.04)


def test_integers_cover_their_range_evenly() -> None:
    counts = np.bincount(Draws(3).integers(-2, 5, 14000) + 2)
    assert counts.shape == (7,)
    assert abs(counts - 2000).max() < 200
    assert Draws(3).integer(4, 5) == 4
    with pytest.raises(ValueError, match="high must be above low, got low=4 high=4"):
        Draws(3).integer(4, 4)


def test_real_numbers_lie_between_their_ends() -> None:
    values = [Draws(seed).real(-3, 5) for seed in range(200)]
    assert -3 < min(values) < -2
    assert 4 < max(values) < 5
