"""Training losses by noise level: where a network still learns, and where it no longer does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from palette.diffusion.schedule import Schedule

LEVELS = 4
PREFIX = "loss_level_"
"""Metrics are ``loss_level_1``, the quarter of the draws with the least noise, to ``_4``."""


class LevelLosses:
    """Sums of losses since the last line of ``metrics.jsonl``, by quarters of the levels drawn.

    Args:
        schedule: whose levels are drawn in training, each of its steps as often as any other.
        device: where the losses are.
    """

    def __init__(self, schedule: Schedule, device: torch.device | str = "cpu") -> None:
        last = len(schedule.gammas) - 1
        places = [round(last * quarter / LEVELS) for quarter in range(1, LEVELS)]
        self._edges = torch.from_numpy(schedule.gammas[places].astype(np.float32)).to(device)
        self._numbers = torch.arange(LEVELS, device=device)
        self.sums = torch.zeros(2, LEVELS, dtype=torch.float64)
        """Of the losses, and how many they are; a part of the trainer's state."""

    def of(self, per_sample: Tensor, gamma: Tensor) -> Tensor:
        """Losses [N] at the levels ``gamma`` [N]: sums and counts, float64 [2, LEVELS]."""
        number = (gamma[:, None] < self._edges).sum(1)
        chosen = (number[:, None] == self._numbers).to(torch.float64)  # [N, LEVELS]
        return torch.stack((per_sample.double() @ chosen, chosen.sum(0)))

    def add(self, sums: Tensor) -> None:
        """Add what :meth:`of` found, over all processes."""
        self.sums += sums.to("cpu")

    def take(self) -> dict[str, float]:
        """Mean losses since the last call, of the levels that came up."""
        found = {
            f"{PREFIX}{level}": total / count
            for level, (total, count) in enumerate(self.sums.T.tolist(), 1)
            if count
        }
        self.sums.zero_()
        return found
