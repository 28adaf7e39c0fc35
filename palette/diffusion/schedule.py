"""Noise schedules over the continuous noise level gamma, and the grids that solvers walk on.

Gamma is the share of signal variance left in y = sqrt(gamma) x0 + sqrt(1 - gamma) epsilon
(alpha-bar of DDPM). A schedule is the decreasing list of gammas that a model is trained between; a
grid of levels is the increasing list of gammas that a solver visits, from nearly pure noise to 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


def _linear(steps: int, start: float, end: float) -> Array:
    return np.linspace(start, end, steps, dtype=np.float64)


def _quad(steps: int, start: float, end: float) -> Array:
    return _linear(steps, start**0.5, end**0.5) ** 2


def _const(steps: int, start: float, end: float) -> Array:
    return np.full(steps, end, dtype=np.float64)


def _warmup(steps: int, start: float, end: float, fraction: float) -> Array:
    values = _const(steps, start, end)
    ramp = int(steps * fraction)
    values[:ramp] = _linear(ramp, start, end)
    return values


def _warmup10(steps: int, start: float, end: float) -> Array:
    return _warmup(steps, start, end, 0.1)


def _warmup50(steps: int, start: float, end: float) -> Array:
    return _warmup(steps, start, end, 0.5)


def _sigmoid(steps: int, start: float, end: float) -> Array:
    ramp = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps, dtype=np.float64)))
    return np.asarray(start + (end - start) * ramp, dtype=np.float64)


def _cosine(steps: int, offset: float) -> Array:
    """Betas of gamma(t) = cos^2(pi/2 (t + s)/(1 + s)), at most 0.999 (Nichol and Dhariwal 2021)."""
    time = np.arange(steps + 1, dtype=np.float64) / steps + offset
    gammas = np.cos(time / (1.0 + offset) * np.pi / 2.0) ** 2
    gammas = gammas / gammas[0]
    return np.asarray(np.minimum(1.0 - gammas[1:] / gammas[:-1], 0.999), dtype=np.float64)


_RAMPS: dict[str, Callable[[int, float, float], Array]] = {
    "linear": _linear,
    "quad": _quad,
    "quadratic": _quad,
    "const": _const,
    "warmup10": _warmup10,
    "warmup50": _warmup50,
    "sigmoid": _sigmoid,
}

SCHEDULES: tuple[str, ...] = (*_RAMPS, "jsd", "cosine")


def betas(
    name: str,
    steps: int,
    start: float = 1e-6,
    end: float = 1e-2,
    cosine_offset: float = 8e-3,
) -> Array:
    """Noise variances added by the steps of a named schedule, float64 [steps], each in (0, 1].

    ``linear``, ``quad`` (linear in the square root; also called ``quadratic``), ``const``,
    ``warmup10``, ``warmup50``, ``jsd`` and ``cosine`` are those of the public Palette code;
    ``sigmoid`` is an S-shaped ramp from start to end. ``const`` uses only ``end``, ``cosine`` only
    ``cosine_offset``, ``jsd`` none of the three.

    Raises ValueError for an unknown name and for a number outside its range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule name is '{name}', expected one of {', '.join(SCHEDULES)}")
    if steps < 2:
        raise ValueError(f"schedule steps is {steps}, expected at least 2")
    if name == "jsd":
        return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)
    if name == "cosine":
        if not 0.0 < cosine_offset < 1.0:
            raise ValueError(f"cosine_offset is {cosine_offset}, expected a number in (0, 1)")
        return _cosine(steps, cosine_offset)
    low = end if name == "const" else start
    if not 0.0 < low <= end < 1.0:
        raise ValueError(
            f"schedule start is {start} and end is {end}, expected 0 < start <= end < 1"
        )
    return _RAMPS[name](steps, start, end)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of training: ``gammas``, float64 [T], decreasing, the first nearest to 1.

    Raises ValueError unless the gammas decrease inside [0, 1); only the last may be 0 (``jsd``).
    """

    gammas: Array
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        gammas = self.gammas
        if gammas.ndim != 1 or gammas.shape[0] < 2:
            raise ValueError(f"gammas has shape {gammas.shape}, expected [T] with T >= 2")
        if not (gammas[0] < 1.0 and gammas[-1] >= 0.0 and bool((np.diff(gammas) < 0.0).all())):
            raise ValueError("gammas must decrease strictly inside [0, 1)")

    @classmethod
    def from_name(
        cls,
        name: str,
        steps: int,
        start: float = 1e-6,
        end: float = 1e-2,
        cosine_offset: float = 8e-3,
    ) -> Schedule:
        """The schedule of ``betas`` with these arguments."""
        alphas = 1.0 - betas(name, steps, start, end, cosine_offset)
        return cls(np.cumprod(alphas, dtype=np.float64))

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest gamma that training sees; a final gamma of 0 is left out."""
        positive = self.gammas[self.gammas > 0.0]
        return float(positive[-1]), float(positive[0])

    def buffers(self) -> dict[str, Tensor]:
        """The six float32 [T] tables that a published checkpoint keeps beside its weights."""
        gammas = self.gammas
        previous = np.concatenate(([1.0], gammas[:-1]))
        alphas = gammas / previous
        variance = (1.0 - alphas) * (1.0 - previous) / (1.0 - gammas)
        with np.errstate(divide="ignore"):  # a final gamma of 0 has no finite reciprocal
            recip = 1.0 / gammas
        tables = {
            "gammas": gammas,
            "sqrt_recip_gammas": np.sqrt(recip),
            "sqrt_recipm1_gammas": np.sqrt(recip - 1.0),
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": (1.0 - alphas) * np.sqrt(previous) / (1.0 - gammas),
            "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - gammas),
        }
        return {name: torch.from_numpy(t.astype(np.float32)) for name, t in tables.items()}

    def draw(self, t_uniform: Tensor, u: Tensor) -> Tensor:
        """Training noise levels as the public code draws them, float32 [N] in (0, 1).

        ``t_uniform`` and ``u``, float32 [N] in [0, 1], choose the step t, uniform in 1..T-1, and
        the place between gamma_{t-1} and gamma_t, uniform in gamma (not in its square root).
        """
        table = self._on_device.get(u.device)
        if table is None:
            table = torch.from_numpy(self.gammas.astype(np.float32)).to(u.device)
            self._on_device[u.device] = table
        last = table.shape[0] - 1
        t = (t_uniform * last).long().clamp_(0, last - 1) + 1
        upper = table[t - 1]
        gamma = upper + u * (table[t] - upper)
        return gamma.clamp_(min=torch.finfo(torch.float32).tiny)


def published(schedule: Schedule, lowest: float = 0.0) -> Array:
    """Every level of the schedule from noise to image, float64 [steps+1], the last 1.0.

    This is the grid of the public code, one network evaluation per step of the schedule. With
    ``lowest`` (as a rule ``trained.range[0]`` of the training schedule) levels below it are left
    out: 532 of the 1000 published inference steps lie below the smallest gamma ever trained.

    What these 532 evaluations can change: all x0 of theirs together enter the state with weight
    sqrt(gamma) = 0.0067, whatever the network answers; the rest is fresh noise. With a perfect
    network and Gaussian pixels of mean and spread 0.5, leaving them out moves the mean by 0.0007
    grey levels and the spread by 2e-10 of itself. Only what a whole image has in common shows
    more: a brightness that varies by 0.25 from one 256x256 image to the next, with nothing in the
    condition to tell it, varies by 1.2 % less; at 128x128 by 0.1 %.

    Raises ValueError when no level is left.
    """
    levels = schedule.gammas[::-1]
    levels = levels[(levels > 0.0) & (levels >= lowest)]
    if levels.shape[0] == 0:
        raise ValueError(f"lowest is {lowest}, expected at most {schedule.range[1]}")
    return np.append(levels, 1.0)


def spaced(schedule: Schedule, steps: int, highest: float = 0.9999) -> Array:
    """Levels for ``steps`` evaluations, uniform in log-SNR inside the trained range, then 1.0.

    Returns float64 [steps+1], increasing. The log-SNR is ln(gamma / (1 - gamma)); no level lies
    outside the range of gammas that the model was trained on (the public code's grid does).

    The network is last evaluated at ``highest`` at most, where noise of 0.01 is left (1.3 of 255
    grey levels), which it removes in one step. The published training range goes on to 0.999999;
    spending evaluations there costs more elsewhere than it gains: on a Gaussian target with the
    spectrum of photographs, dpmpp_2m is off by 1.3 % rather than 0.9 % of the signal's amplitude
    at 25 evaluations, and by 28 % rather than 16 % at 5.

    Raises ValueError when ``steps`` is below 1, or ``highest`` below the trained range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    low, high = schedule.range
    if not highest > low:
        raise ValueError(f"highest is {highest}, expected a level above {low:.3g}")
    high = min(high, highest)
    ends = np.log([low, high]) - np.log1p([-low, -high])
    log_snr = np.linspace(ends[0], ends[1], steps, dtype=np.float64)
    levels = np.clip(1.0 / (1.0 + np.exp(-log_snr)), low, high)
    return np.append(levels, 1.0)
