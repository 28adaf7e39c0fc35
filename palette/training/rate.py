"""The learning rate: a function of the step alone, so that a resumed run needs no state of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from palette.config import Train


def learning_rate(step: int, train: Train) -> float:
    """Learning rate of a step, counted from 0.

    It rises linearly in the first ``train.warmup`` steps (Palette section 4: 10,000 of them), then
    follows ``train.lr_schedule`` from ``train.lr`` down to no less than ``train.lr_end`` of it.
    Cosine is that of Loshchilov & Hutter 2017 ("SGDR", equation 5) without restarts, linear the
    annealing of guided-diffusion's ``lr_anneal_steps``. Both reach their end when ``train.steps``
    are done, so the last step still learns.
    """
    rise = min(1.0, (step + 1) / max(train.warmup, 1))
    since = max(step - train.warmup, 0)
    return train.lr * rise * _SHARES[train.lr_schedule](since, train)


def _constant(since: int, train: Train) -> float:
    return 1.0


def _linear(since: int, train: Train) -> float:
    return train.lr_end + (1.0 - train.lr_end) * (1.0 - _done(since, train))


def _cosine(since: int, train: Train) -> float:
    left = 0.5 * (1.0 + math.cos(math.pi * _done(since, train)))
    return train.lr_end + (1.0 - train.lr_end) * left


def _exponential(since: int, train: Train) -> float:
    return max(math.pow(train.lr_factor, since / train.lr_every), train.lr_end)


def _step(since: int, train: Train) -> float:
    return _exponential(since - since % train.lr_every, train)


def _done(since: int, train: Train) -> float:
    """Share of the steps after warm-up that are done."""
    return min(since / max(train.steps - train.warmup, 1), 1.0)


_SHARES: dict[str, Callable[[int, Train], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "exponential": _exponential,
    "step": _step,
}
