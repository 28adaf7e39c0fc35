"""Averages of the weights: the one that samples are drawn from, and further ones by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from palette.config import Train
from palette.training.sharding import load_weights, own_part


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
        self._trained = network

    # Taken at the first update: sharding, which comes after the copy, replaces the parameters.
    @functools.cached_property
    def _of(self) -> dict[Tensor, Tensor]:
        both = zip(self._trained.parameters(), self.network.parameters(), strict=True)
        return {weight: own_part(average) for weight, average in both}

    @functools.cached_property
    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.network.buffers(), self._trained.buffers(), strict=True))

    def decay_now(self) -> float:
        """d of the next update."""
        rise = (1 + self.updates) / (10 + self.updates)
        return min(self.decay, rise) if self.warmup else self.decay

    def of(self) -> Mapping[Tensor, Tensor]:
        """Each of the network's weights, and its average."""
        return self._of

    @torch.no_grad()
    def update(self, but: Sequence[Tensor] = ()) -> None:
        """Take in the network's weights, in one pass over all parameters; buffers are copied.

        Args:
            but: weights that have been taken in already.
        """
        done = set(but)
        rest = [weight for weight in self._of if weight not in done]
        if rest:
            averages = [self._of[weight] for weight in rest]
            torch._foreach_lerp_(averages, [own_part(each) for each in rest], 1 - self.decay_now())
        for kept, buffer in self._buffers:
            kept.copy_(buffer)
        self.updates += 1

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore the average (strictly) and the number of updates."""
        load_weights(self.network, state)
        self.updates = updates


class Mean(EMA):
    """The equal mean of the weights at every update: stochastic weight averaging (Izmailov et al.
    2018, "Averaging Weights Leads to Wider Optima and Better Generalization")."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, 1.0)

    def decay_now(self) -> float:
        """n / (n + 1)."""
        return self.updates / (self.updates + 1)


class Further:
    """Averages beside the main one, each a copy of the network.

    Args:
        network: the trained one.
        train: ``ema_decays`` has an EMA each, named by its decay ("0.999"); from step ``swa_start``
            on "swa" takes in the weights.
    """

    def __init__(self, network: nn.Module, train: Train) -> None:
        self._swa_start = train.swa_start
        self._averages = {
            str(decay): EMA(network, decay, warmup=train.ema_warmup) for decay in train.ema_decays
        }
        if train.swa_start is not None:
            self._averages["swa"] = Mean(network)

    def networks(self) -> list[nn.Module]:
        """The copies that hold the averages."""
        return [average.network for average in self._averages.values()]

    def update(self, step: int) -> None:
        """Take in the network's weights at a step, counted from 0."""
        for average in self._averages.values():
            begun = not isinstance(average, Mean) or step >= (self._swa_start or 0)
            if begun:
                average.update()

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The averages by name; "swa" once it has begun, before that it is nobody's weights."""
        return {
            name: average.network.state_dict()
            for name, average in self._averages.items()
            if average.updates or not isinstance(average, Mean)
        }

    def updates(self) -> dict[str, int]:
        """How many updates each had."""
        return {name: average.updates for name, average in self._averages.items()}

    def load(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        updates: Mapping[str, int],
        weights: Mapping[str, Tensor],
    ) -> None:
        """Restore those that were saved; the others begin at ``weights``."""
        for name, average in self._averages.items():
            known = name in states
            average.load(states[name] if known else weights, updates[name] if known else 0)
