"""Solvers of the reverse process: tables of coefficients that ``ops.reverse_step`` walks down.

A row (a, b, c1, c2, c3, sigma) says, for network output o at noise level gamma_i:

    x0 = clamp(a y + b o, -1, 1)
    y' = c1 x0 + c2 y + c3 x0_before + sigma z,   z ~ N(0, 1)

so y' is at level gamma_{i+1}. A solver is a plain function from the increasing levels [S+1] (noise
to image, the last as a rule 1.0) and the kind of prediction to a float64 table [S, 6]. ``unipc``
looks back one step further and has a seventh column w: its x0_before is that of the step before
plus w times that of two steps before.
"""

from __future__ import annotations

import numpy as np

from palette.diffusion.schedule import Array

REGRESSION = "regression"
"""The image at once, from no noise: the paper's baseline, one evaluation of the same network."""

PREDICTIONS: tuple[str, ...] = ("epsilon", "x0", "v", REGRESSION)


def ddpm(levels: Array, prediction: str = "epsilon") -> Array:
    """Ancestral sampling with the posterior ("small") variance (Ho et al. 2020, eq. 6-7).

    On ``schedule.published`` levels the float32 table is the one of the public Palette code.
    """
    levels, following = _pairs(levels)
    beta = 1.0 - levels / following
    variance = beta * (1.0 - following) / (1.0 - levels)
    # The public code keeps the log variance as float32, which shows in the seventh digit.
    log_variance = np.log(np.maximum(variance, 1e-20)).astype(np.float32).astype(np.float64)
    return _table(
        levels,
        prediction,
        c1=beta * np.sqrt(following) / (1.0 - levels),
        c2=(1.0 - following) * np.sqrt(levels / following) / (1.0 - levels),
        sigma=np.where(variance > 0.0, np.exp(0.5 * log_variance), 0.0),
    )


def ddim(levels: Array, prediction: str = "epsilon", eta: float = 0.0) -> Array:
    """DDIM (Song et al. 2021, eq. 12 and 16), deterministic at eta 0, ``ddpm`` at eta 1.

    Epsilon is derived again from the clamped x0. Raises ValueError unless eta is in [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}, expected a number in [0, 1]")
    levels, following = _pairs(levels)
    variance = eta**2 * (1.0 - following) / (1.0 - levels) * (1.0 - levels / following)
    c2 = np.sqrt((1.0 - following - variance) / (1.0 - levels))
    return _table(
        levels,
        prediction,
        c1=np.sqrt(following) - np.sqrt(levels) * c2,
        c2=c2,
        sigma=np.sqrt(variance),
    )


def dpmpp_2m(levels: Array, prediction: str = "epsilon") -> Array:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    The first step, and a last one to gamma = 1, are of first order: there is no x0 before the one,
    and the other is infinitely long in log-SNR, where x0 itself is the answer.
    """
    levels, following = _pairs(levels)
    first_order, decay = _exponential(levels, following)
    share = _extrapolation(levels, following)
    return _table(
        levels,
        prediction,
        c1=first_order * (1.0 + share),
        c2=decay,
        c3=-first_order * share,
    )


def dpmpp_2m_sde(levels: Array, prediction: str = "epsilon") -> Array:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): ``dpmpp_2m`` for the SDE, with fresh noise each step.

    With an x0 that is not extrapolated it would be ``ddpm``. The noise mends what the network gets
    wrong at the levels before, as it does there; the extrapolation saves most of the steps.
    """
    levels, following = _pairs(levels)
    share = _extrapolation(levels, following)
    posterior = ddpm(np.append(levels, following[-1]), prediction)
    c1 = posterior[:, 2]
    posterior[:, 2], posterior[:, 4] = c1 * (1.0 + share), -c1 * share
    return posterior


def unipc(levels: Array, prediction: str = "epsilon") -> Array:
    """UniPC of order 2 (Zhao et al. 2023): third order, one evaluation a step, table [S, 7].

    The network is evaluated at the predicted state; its answer then corrects that state before the
    next prediction. Both are exponential Adams formulas in the half log-SNR (with exact integrals,
    where the choice of their B(h) cancels), and together they are linear in the state and three
    x0: one row. The orders rise over the first steps, and a last step to gamma = 1 returns x0.
    """
    levels, following = _pairs(levels)
    places = _half_log_snr(np.append(levels, following[-1]))
    _, decay = _exponential(levels, following)
    weights = np.zeros((levels.shape[0], 3))  # of x0 now, one step ago, two steps ago
    predicted = np.zeros(2)  # weights that the step before gave its x0 now and one step ago
    for i, level in enumerate(levels):
        if i > 0:
            behind = places[max(i - 2, 0) : i + 1][::-1]
            correction = _adams(level, places[i - 1], places[i], behind)
            weights[i, : len(correction)] = decay[i] * correction
            weights[i, 1:] -= decay[i] * predicted
        predicted = np.zeros(2)
        if following[i] == 1.0:
            predicted[0] = 1.0
        else:
            behind = places[max(i - 1, 0) : i + 1][::-1]
            predicted[: len(behind)] = _adams(following[i], places[i], places[i + 1], behind)
        weights[i, :2] += predicted
    c3 = weights[:, 1]
    two_ago = np.divide(weights[:, 2], c3, out=np.zeros_like(c3), where=c3 != 0.0)
    table = _table(levels, prediction, c1=weights[:, 0], c2=decay, c3=c3)
    return np.column_stack((table, two_ago))


SOLVERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}


def coefficients(
    solver: str, levels: Array, prediction: str = "epsilon", eta: float = 0.0
) -> Array:
    """The table of a solver by name; ``eta`` belongs to ``ddim`` alone.

    Raises ValueError for an unknown solver or prediction, an eta that the solver has no use for,
    and levels that do not increase inside (0, 1].
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is '{solver}', expected one of {', '.join(SOLVERS)}")
    if solver == "ddim":
        return ddim(levels, prediction, eta)
    if eta != 0.0:
        raise ValueError(f"eta is {eta}, expected 0 with solver '{solver}' (only ddim has an eta)")
    return SOLVERS[solver](levels, prediction)


def _pairs(levels: Array) -> tuple[Array, Array]:
    """Check the levels [S+1] and split them: those evaluated [S], those reached [S]."""
    levels = np.asarray(levels, dtype=np.float64)
    if levels.ndim != 1 or levels.shape[0] < 2:
        raise ValueError(f"levels has shape {levels.shape}, expected [steps + 1], at least 2")
    if not (levels[0] > 0.0 and levels[-1] <= 1.0 and bool((np.diff(levels) > 0.0).all())):
        raise ValueError("levels must increase strictly inside (0, 1], from noise to image")
    return levels[:-1], levels[1:]


def _half_log_snr(levels: Array) -> Array:
    """Lambda of the DPM-Solver papers, ln(signal amplitude / noise amplitude), infinite at 1."""
    with np.errstate(divide="ignore"):
        return np.asarray(0.5 * (np.log(levels) - np.log1p(-levels)), dtype=np.float64)


def _exponential(levels: Array, following: Array) -> tuple[Array, Array]:
    """Weights of x0 and y in the step that is exact for a constant x0 (DDIM without noise)."""
    decay = np.sqrt((1.0 - following) / (1.0 - levels))
    return np.sqrt(following) - np.sqrt(levels) * decay, decay


def _extrapolation(levels: Array, following: Array) -> Array:
    """Half a step ahead in log-SNR, as a share of the last step: how far 2M carries x0 on."""
    width = np.diff(_half_log_snr(np.append(levels, following[-1])))
    share = np.zeros_like(levels)
    share[1:] = 0.5 * width[1:] / width[:-1]
    share[following == 1.0] = 0.0
    return share


def _adams(level: float, begin: float, end: float, places: Array) -> Array:
    """Weights of x0 known at ``places`` in the step from ``begin`` to ``end``, all half log-SNRs.

    They integrate exp(lambda - end) times the polynomial through the known x0, times the signal
    amplitude at the end, sqrt(level). Gauss-Legendre with 24 nodes is exact to rounding for steps
    of up to 20.
    """
    nodes, quadrature = np.polynomial.legendre.leggauss(24)
    at = begin + (end - begin) * (nodes + 1.0) / 2.0
    kernel = np.sqrt(level) * quadrature * (end - begin) / 2.0 * np.exp(at - end)
    weights = np.empty_like(places)
    for i, place in enumerate(places):
        others = np.delete(places, i)
        lagrange = np.prod((at[:, None] - others) / (place - others), axis=1)
        weights[i] = (kernel * lagrange).sum()
    return weights


def _table(
    levels: Array,
    prediction: str,
    *,
    c1: Array,
    c2: Array,
    c3: Array | float = 0.0,
    sigma: Array | float = 0.0,
) -> Array:
    if prediction == "epsilon":
        a, b = np.sqrt(1.0 / levels), -np.sqrt(1.0 / levels - 1.0)
    elif prediction in ("x0", REGRESSION):
        a, b = np.zeros_like(levels), np.ones_like(levels)
    elif prediction == "v":
        a, b = np.sqrt(levels), -np.sqrt(1.0 - levels)
    else:
        raise ValueError(f"prediction is '{prediction}', expected one of {', '.join(PREDICTIONS)}")
    return np.stack(np.broadcast_arrays(a, b, c1, c2, c3, sigma), axis=1)
