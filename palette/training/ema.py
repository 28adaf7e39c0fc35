"""An exponential moving average of the weights, the weights that samples are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """average += (1 - d) * (weights - average), with d = min(decay, (1 + n) / (10 + n)) at the
    n-th update, counted from 0: without the warm-up the random start would linger for 1/(1-decay)
    steps (the warm-up is TensorFlow's ``num_updates``; Palette section 4 has decay 0.9999). The
    published code has none: ``warmup`` False.

    Attributes:
        network: a copy of the network that holds the average, in evaluation mode.
        updates: n, how often :meth:`update` was called.
    """

    def __init__(self, network: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._average: list[Tensor] = list(self.network.parameters())
        self._weights: list[Tensor] = list(network.parameters())
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    def decay_now(self) -> float:
        """d of the next update."""
        rise = (1 + self.updates) / (10 + self.updates)
        return min(self.decay, rise) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's weights, in one pass over all parameters; buffers are copied."""
        torch._foreach_lerp_(self._average, self._weights, 1.0 - self.decay_now())
        for kept, buffer in self._buffers:
            kept.copy_(buffer)
        self.updates += 1

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore the average (strictly) and the number of updates."""
        self.network.load_state_dict(state)
        self.updates = updates
