"""Solvers on targets whose reverse process is known exactly, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch

from palette.diffusion.schedule import Schedule, published, spaced
from palette.diffusion.solvers import (
    PREDICTIONS,
    SOLVERS,
    coefficients,
    ddim,
    ddpm,
    dpmpp_2m_sde,
)
from palette.ops import reverse_step

Array = npt.NDArray[np.float64]
Denoiser = Callable[[Array, float], Array]  # E[x0 | y] at gamma

MEAN, SPREAD = 0.2, 0.15
SCHEDULE = Schedule.from_name("linear", 2000, 1e-6, 0.01)


def gaussian(y: Array, gamma: float) -> Array:
    """E[x0 | y] for x0 ~ N(MEAN, SPREAD^2)."""
    variance = gamma * SPREAD**2 + 1 - gamma
    return MEAN + gamma**0.5 * SPREAD**2 / variance * (y - gamma**0.5 * MEAN)


def mixture(y: Array, gamma: float) -> Array:
    """E[x0 | y] for an even mixture of N(0.5, 0.1^2) and N(-0.3, 0.2^2)."""
    total, weights = np.zeros_like(y), np.zeros_like(y)
    for mean, spread in ((0.5, 0.1), (-0.3, 0.2)):
        variance = gamma * spread**2 + 1 - gamma
        distance = y - gamma**0.5 * mean
        weight = np.exp(-0.5 * distance**2 / variance) / variance**0.5
        total += weight * (mean + gamma**0.5 * spread**2 / variance * distance)
        weights += weight
    return total / weights


def answer(denoiser: Denoiser, prediction: str, y: Array, gamma: float) -> Array:
    """What a perfect network says."""
    x0 = denoiser(y, gamma)
    epsilon = (y - gamma**0.5 * x0) / (1 - gamma) ** 0.5
    if prediction == "v":
        return gamma**0.5 * epsilon - (1 - gamma) ** 0.5 * x0
    return x0 if prediction == "x0" else epsilon


def walk(
    solver: str,
    levels: Array,
    start: Array,
    denoiser: Denoiser = gaussian,
    prediction: str = "epsilon",
    eta: float = 0.0,
    noise: Array | None = None,
) -> Array:
    """Run a table through ``reverse_step`` in float64; ``noise`` is [S, *start.shape]."""
    table = torch.from_numpy(coefficients(solver, levels, prediction, eta))
    state = torch.from_numpy(start.copy()).reshape(1, 1, 1, -1)
    before, older = torch.zeros_like(state), torch.zeros_like(state)
    for i, gamma in enumerate(levels[:-1]):
        output = torch.from_numpy(answer(denoiser, prediction, state.numpy(), gamma))
        z = None if noise is None else torch.from_numpy(noise[i]).reshape(1, 1, 1, -1)
        history = before + table[i, 6:].sum() * older
        reverse_step(
            state, output, table[:, :6].contiguous(), torch.tensor(i), noise=z, history=history
        )
        before, older = history, before
    return state.numpy().reshape(-1)


def log_snr_grid(low: float, high: float, steps: int) -> Array:
    """Levels uniform in log-SNR that end below 1, so that no step is infinitely long."""
    ends = np.log([low / (1 - low), high / (1 - high)])
    return 1 / (1 + np.exp(-np.linspace(ends[0], ends[1], steps + 1)))


def observed_order(solver: str, exact: Array, denoiser: Denoiser) -> float:
    """Slope of the error against the number of steps, from 64 to 256 steps."""
    start = np.linspace(-2, 2, 41)
    errors = []
    for steps in (64, 256):
        end = walk(solver, log_snr_grid(1e-3, 0.99, steps), start, denoiser)
        errors.append(np.abs(end - exact).max())
    return float(np.log(errors[0] / errors[1]) / np.log(4))


ORDERS = {"ddim": 1, "dpmpp_2m": 2, "unipc": 3}


@pytest.mark.parametrize("solver", ORDERS)
def test_deterministic_solvers_reach_the_ode_of_a_gaussian_at_their_order(solver: str) -> None:
    def spread(gamma: float) -> float:
        return (gamma * SPREAD**2 + 1 - gamma) ** 0.5

    # the probability-flow ODE of a Gaussian keeps the distance from the mean in units of its spread
    start, (low, high) = np.linspace(-2, 2, 41), (1e-3, 0.99)
    exact = high**0.5 * MEAN + spread(high) / spread(low) * (start - low**0.5 * MEAN)
    assert observed_order(solver, exact, gaussian) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", ORDERS)
def test_deterministic_solvers_reach_the_ode_of_a_mixture_at_their_order(solver: str) -> None:
    start = np.linspace(-2, 2, 41)
    coarse, fine = (
        walk("dpmpp_2m", log_snr_grid(1e-3, 0.99, steps), start, mixture) for steps in (4000, 8000)
    )
    assert np.abs(coarse - fine).max() < 2e-6
    exact = fine + (fine - coarse) / 3  # Richardson
    assert observed_order(solver, exact, mixture) == pytest.approx(ORDERS[solver], abs=0.2)


def end_of_a_gaussian(
    table: Array, levels: Array, target_mean: float = MEAN, spread: float = SPREAD
) -> tuple[float, float]:
    """Mean and variance of the samples of a Gaussian target, carried exactly through the table."""
    mean, covariance = np.zeros(2), np.diag([1.0, 0.0])  # of the state and the x0 before
    for (_, _, c1, c2, c3, sigma), gamma in zip(table, levels[:-1], strict=True):
        # x0 is linear in y: E[x0 | y] = offset + slope * y
        slope = gamma**0.5 * spread**2 / (gamma * spread**2 + 1 - gamma)
        offset = target_mean * (1 - slope * gamma**0.5)
        step = np.array([[c1 * slope + c2, c3], [slope, 0.0]])
        mean = step @ mean + np.array([c1, 1.0]) * offset
        covariance = step @ covariance @ step.T + np.diag([sigma**2, 0.0])
    return float(mean[0]), float(covariance[0, 0])


NOISY = {
    "ddpm": (ddpm, 1),
    "ddim, eta 0.3": (partial(ddim, eta=0.3), 1),
    "dpmpp_2m_sde": (dpmpp_2m_sde, 2),
}


@pytest.mark.parametrize(("solver", "order"), NOISY.values(), ids=NOISY)
def test_random_solvers_reach_the_distribution_at_their_order(
    solver: Callable[[Array], Array], order: int
) -> None:
    errors = []
    for steps in (100, 400):
        levels = log_snr_grid(1e-9, 0.99, steps)
        mean, variance = end_of_a_gaussian(solver(levels), levels)
        errors.append(abs(variance - (0.99 * SPREAD**2 + 0.01)))
        assert mean == pytest.approx(0.99**0.5 * MEAN, abs=0.003)
    assert errors[1] < 0.05 * SPREAD**2
    assert np.log(errors[0] / errors[1]) / np.log(4) == pytest.approx(order, abs=0.2)


def test_sde_2m_without_its_extrapolation_is_ddpm() -> None:
    levels = spaced(SCHEDULE, 25)
    ours, ancestral = dpmpp_2m_sde(levels), ddpm(levels)
    of_x0 = ours[:, 2] + ours[:, 4]
    np.testing.assert_allclose(of_x0, ancestral[:, 2], rtol=1e-12)
    np.testing.assert_array_equal(ours[:, [0, 1, 3, 5]], ancestral[:, [0, 1, 3, 5]])
    share = ours[1:-1, 4] / -ancestral[1:-1, 2]
    np.testing.assert_allclose(share, 0.5, rtol=1e-9)  # steps of one length in log-SNR
    assert ours[0, 4] == ours[-1, 4] == 0


def test_published_ddpm_reaches_the_distribution() -> None:
    levels = published(Schedule.from_name("linear", 1000, 1e-4, 0.09))
    mean, variance = end_of_a_gaussian(ddpm(levels), levels)
    assert mean == pytest.approx(MEAN, rel=1e-6)
    assert variance == pytest.approx(SPREAD**2, rel=0.1)


def test_the_dead_half_of_the_published_grid_decides_next_to_nothing() -> None:
    """The numbers in the docstring of ``published``."""
    levels = published(Schedule.from_name("linear", 1000, 1e-4, 0.09))
    alive = published(Schedule.from_name("linear", 1000, 1e-4, 0.09), lowest=SCHEDULE.range[0])
    dead = len(levels) - len(alive)
    of_x0, of_start = 0.0, 1.0
    for _, _, c1, c2, _, _ in ddpm(levels)[:dead]:
        of_x0, of_start = c1 + c2 * of_x0, c2 * of_start
    assert of_x0 == pytest.approx(alive[0] ** 0.5)
    assert of_x0 == pytest.approx(0.0067, abs=5e-5)
    assert of_start < 2e-8

    whole = end_of_a_gaussian(ddpm(levels), levels, 0.5, 0.5)
    short = end_of_a_gaussian(ddpm(alive), alive, 0.5, 0.5)
    assert abs(short[0] - whole[0]) * 127.5 == pytest.approx(7e-4, rel=0.05)
    assert abs(short[1] / whole[1] - 1) < 5e-10
    for side, change in ((256, 0.012), (128, 0.001)):  # the mean of side^2 pixels, as one number
        whole = end_of_a_gaussian(ddpm(levels), levels, 0.0, 0.25 * side)
        short = end_of_a_gaussian(ddpm(alive), alive, 0.0, 0.25 * side)
        assert 1 - (short[1] / whole[1]) ** 0.5 == pytest.approx(change, rel=0.1)


@pytest.mark.parametrize("levels", [spaced(SCHEDULE, 30), published(SCHEDULE)], ids=len)
def test_ddim_at_eta_1_is_ddpm(levels: Array) -> None:
    ours, ancestral = ddim(levels, eta=1.0), ddpm(levels)
    # DDPM keeps its log variance in float32, and near gamma = 1 DDIM's c1 is a small difference
    np.testing.assert_allclose(ours, ancestral, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_predictions_of_consistent_networks_give_the_same_walk(solver: str) -> None:
    rng = np.random.default_rng(0)
    start, levels = rng.standard_normal(16), spaced(SCHEDULE, 20)
    noise = None if solver in ORDERS else rng.standard_normal((20, 16))
    ends = [
        walk(solver, levels, start, mixture, prediction, noise=noise) for prediction in PREDICTIONS
    ]
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ends[2], ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_to_gamma_1_returns_x0(solver: str) -> None:
    table = coefficients(solver, spaced(SCHEDULE, 7))
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table[-1, 2:6], [1, 0, 0, 0], rtol=0, atol=1e-12)
    assert (coefficients(solver, np.array([0.1, 1.0]))[0, 2:6] == [1, 0, 0, 0]).all()


@pytest.mark.parametrize("solver", ORDERS)
def test_a_constant_x0_is_followed_exactly(solver: str) -> None:
    """Steps of any length are exact where the network always sees the same image."""
    start = np.array([-1.0, 0.3])
    levels = np.array([0.01, 0.02, 0.5, 0.51, 0.9])
    end = walk(solver, levels, start, lambda y, gamma: np.full_like(y, 0.25))
    epsilon = (start - 0.1 * 0.25) / 0.99**0.5
    np.testing.assert_allclose(end, 0.9**0.5 * 0.25 + 0.1**0.5 * epsilon, rtol=1e-12)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_the_first_step_of_higher_orders_is_ddim(solver: str) -> None:
    levels = spaced(SCHEDULE, 9)
    first = coefficients(solver, levels)[0, :6]
    np.testing.assert_allclose(first, ddim(levels)[0], rtol=1e-11, atol=1e-15)


def test_ddpm_on_the_published_grid_is_the_published_table() -> None:
    schedule = Schedule.from_name("linear", 1000, 1e-4, 0.09)
    table = torch.from_numpy(ddpm(published(schedule)).astype(np.float32)).flip(0)
    buffers = schedule.buffers()
    assert torch.equal(table[:, 0], buffers["sqrt_recip_gammas"])
    assert torch.equal(table[:, 1], -buffers["sqrt_recipm1_gammas"])
    assert torch.equal(table[:, 2], buffers["posterior_mean_coef1"])
    assert torch.equal(table[:, 3], buffers["posterior_mean_coef2"])
    assert not table[:, 4].any()
    sigma = (0.5 * buffers["posterior_log_variance_clipped"]).exp()
    torch.testing.assert_close(table[1:, 5], sigma[1:], rtol=1.2e-7, atol=0)
    assert table[0, 5] == 0  # the published code draws no noise there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("euler", [0.1, 1.0]),
            "solver is 'euler', expected one of ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, unipc",
        ),
        (("ddpm", [0.1, 1.0], "noise"), "prediction is 'noise', expected one of epsilon, x0, v"),
        (("ddpm", [0.1, 1.0], "epsilon", 0.5), "eta is 0.5, expected 0 with solver 'ddpm'"),
        (("ddim", [0.1, 1.0], "epsilon", 1.5), "eta is 1.5"),
        (("ddim", [1.0]), "levels has shape"),
        (("ddim", [0.5, 0.1]), "levels must increase"),
        (("ddim", [0.0, 1.0]), "levels must increase"),
        (("ddim", [0.5, 1.1]), "levels must increase"),
    ],
)
def test_mistakes_are_named(arguments: tuple[object, ...], message: str) -> None:
    solver, levels, *rest = arguments
    with pytest.raises(ValueError, match=message):
        coefficients(solver, np.array(levels), *rest)
