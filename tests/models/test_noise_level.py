"""What networks are told of the noise level."""

from __future__ import annotations

import numpy as np
import torch

from palette.models.noise_level import Embedding, noise_level, sinusoids


def test_log_snr_tells_apart_levels_that_gamma_does_not() -> None:
    """Neighbouring levels of training lie 0.1 or more apart; published ones hardly differ."""
    gamma = torch.tensor([4.4e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999, 0.999999])

    def smallest_step(embedding: Embedding) -> float:
        vectors = torch.cat(sinusoids(noise_level(gamma, embedding), 64), dim=1)
        return float((vectors[1:] - vectors[:-1]).norm(dim=1).min())

    assert smallest_step("gamma") < 1e-3
    assert smallest_step("log_snr") > 1


def test_log_snr_is_finite_and_within_the_range_of_the_sinusoids() -> None:
    level = noise_level(torch.tensor([0.0, 1e-30, 0.5, 1.0]), "log_snr")
    assert level.tolist() == [1000.0, 1000.0, 500.0, 0.0]


def test_published_levels_are_gamma_itself() -> None:
    gamma = torch.tensor([0.25, 1.0])
    assert torch.equal(noise_level(gamma, "gamma"), gamma)
    assert noise_level(gamma, "sqrt_gamma").tolist() == [0.5, 1.0]
    cosines, sines = sinusoids(gamma, 4)  # frequencies 1 and 1/100
    assert torch.allclose(cosines, torch.cos(gamma[:, None] * torch.tensor([1.0, 0.01])))
    assert torch.allclose(sines, torch.sin(gamma[:, None] * torch.tensor([1.0, 0.01])))


def test_timestep_inverts_the_guided_diffusion_schedule() -> None:
    gammas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    level = noise_level(torch.from_numpy(gammas).float(), "timestep")
    assert torch.allclose(level, torch.arange(1000.0), atol=1e-2)
    assert noise_level(torch.tensor([1.0, 0.0]), "timestep").tolist() == [0.0, 999.0]
