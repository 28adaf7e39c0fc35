"""What a training step does with its gradients: clipping, AdamW, averages of the weights."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from palette import ops
from palette.config import Train
from palette.training.allocator import use_huge_pages
from palette.training.ema import EMA, Further
from palette.training.mixed_precision import MixedPrecision
from palette.training.sharding import clip_


class Update:
    """Each in a pass of its own, by PyTorch.

    Args:
        train: for ``clip``, ``ema_start`` and ``ema_every``.
        network: the trained one.
        optimizer: over its parameters.
        scaler: of the loss.
        ema, further: averages of its weights.
        mixed: its copies in a half type.
    """

    def __init__(
        self,
        train: Train,
        network: nn.Module,
        optimizer: torch.optim.AdamW,
        scaler: torch.amp.GradScaler,
        ema: EMA,
        further: Further,
        mixed: MixedPrecision,
    ) -> None:
        self._train, self._network, self._optimizer = train, network, optimizer
        self._scaler, self._ema, self._further, self._mixed = scaler, ema, further, mixed

    def apply(self, loss: float, step: int) -> float:
        """Advance the weights where all is finite, and forget the gradients.

        Args:
            loss: of the batch, over all processes.
            step: counted from 0.

        Returns:
            The norm of all gradients together, before clipping.
        """
        self._scaler.unscale_(self._optimizer)
        norm = clip_(self._network, self._train.clip).item()
        if math.isfinite(loss) and math.isfinite(norm):
            self._scaler.step(self._optimizer)
            if self._averages_at(step):
                self._ema.update()
                self._further.update(step)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _averages_at(self, step: int) -> bool:
        train = self._train
        return step >= train.ema_start and (step + 1) % train.ema_every == 0


class OnePass(Update):
    """All in one pass over the weights, and the rounding to their copies with it: on a CPU."""

    _paged = False  # whether the tensors that last have large pages

    def apply(self, loss: float, step: int) -> float:
        """As of any update, but the norm is NaN where the loss is not finite."""
        self._mixed.collect()
        norm = self._advance(step) if math.isfinite(loss) else math.nan
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _advance(self, step: int) -> float:
        (group,) = self._optimizer.param_groups
        lists: list[list[Tensor]] = [[], [], [], [], [], []]
        self._optimizer._init_group(group, *lists)  # type: ignore[no-untyped-call]
        weights, grads, means, squares, _, steps = lists
        if not self._paged:  # the moments are there from the first step on
            self._paged = True
            lasting = (
                weights,
                means,
                squares,
                self._ema.of().values(),
                self._mixed.copies().values(),
            )
            use_huge_pages(itertools.chain(*lasting))
        averaging = self._averages_at(step)
        averages, copies, none = self._ema.of(), self._mixed.copies(), torch.empty(0).bfloat16()
        norm = ops.adamw(
            weights,
            grads,
            means,
            squares,
            steps,
            [averages[weight] for weight in weights] if averaging else [],
            [copies.get(weight, none) for weight in weights] if copies else [],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            limit=self._train.clip,
            take=1 - self._ema.decay_now(),
        ).item()
        if math.isfinite(norm):
            self._mixed.rounded()
            if averaging:
                self._ema.update(but=weights)
                self._further.update(step)
        return norm
