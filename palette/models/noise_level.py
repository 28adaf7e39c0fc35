"""How a network is told the noise level: a number per image, and sinusoids of it."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Embedding = Literal["log_snr", "gamma", "sqrt_gamma", "timestep"]
EMBEDDINGS: tuple[str, ...] = get_args(Embedding)

_LOG_SNR_LIMIT = 20.0


def noise_level(gamma: Tensor, embedding: Embedding) -> Tensor:
    """The number that stands for gamma, float32 [N] (float64 for float64) from gamma [N].

    ``log_snr``, for new networks: ln(gamma / (1 - gamma)), clipped to +-20 as in Salimans & Ho
    2022, mapped linearly onto [0, 1000] (0 clean, 1000 noise), the range that the sinusoids were
    made for (Ho et al. 2020) and onto which Kingma et al. 2021 map their log-SNR too. It moves by
    25 for each unit of log-SNR.

    ``gamma`` (Palette) and ``sqrt_gamma`` (SR3) stay in [0, 1], where sinusoids of period 6 and
    more hardly move: levels below 1e-3 are nearly one and the same. For old weights.

    ``timestep``, for guided-diffusion weights: the step, between 0 and 999, at which their linear
    schedule reaches gamma; linear in ln gamma between two steps.
    """
    gamma = gamma.reshape(-1)
    gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
    if embedding == "gamma":
        return gamma
    if embedding == "sqrt_gamma":
        return gamma.sqrt()
    if embedding == "timestep":
        return _timestep(gamma)
    log_snr = (gamma.log() - torch.log1p(-gamma)).clamp(-_LOG_SNR_LIMIT, _LOG_SNR_LIMIT)
    return (_LOG_SNR_LIMIT - log_snr) * (1000 / (2 * _LOG_SNR_LIMIT))


def sinusoids(level: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, channels/2] each of level [N] at frequencies 10000^(-2k/channels)."""
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=level.device)
    angle = level[:, None] * torch.exp(-math.log(10000) / half * k)
    return angle.cos(), angle.sin()


def _timestep(gamma: Tensor) -> Tensor:
    """Inverse of gamma_t = prod(1 - beta), beta from 1e-4 to 0.02 in 1000 steps."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=gamma.device)
    depth = -torch.log1p(-beta).cumsum(0)  # -ln gamma_t, increasing
    wanted = -gamma.to(torch.float64).log()
    after = torch.searchsorted(depth, wanted).clamp(1, len(depth) - 1)
    before = depth[after - 1]
    place = after - 1 + (wanted - before) / (depth[after] - before)
    return place.clamp(0, len(depth) - 1).to(gamma.dtype)
