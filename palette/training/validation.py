"""How good the averaged weights are on samples never trained on, by loss and by sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from palette.build import build_levels, condition_channels
from palette.config import Config
from palette.data.dataset import Batch, Batches, TaskDataset
from palette.data.loader import Loader
from palette.diffusion import objective
from palette.diffusion.sampler import CancelledError, Sampler
from palette.diffusion.schedule import Schedule
from palette.training.distributed import World
from palette.training.interrupts import Interrupts
from palette.training.sharding import whole

_ORDER = ("input", "sample", "raw", "truth")


class Scores(NamedTuple):
    """What a validation found."""

    loss: float
    """Mean training loss over all validation samples, at fixed noise levels."""
    mae: float | None
    """Mean absolute error of samples in the hole (without a mask: everywhere), of 255 levels.
    None where pictures are made from nothing: there is no truth to compare them with."""
    columns: dict[str, Tensor]
    """This process's share of ``input``, ``sample`` (by the averaged weights), ``raw`` (by those
    trained) and ``truth``, each [N, C, H, W], as far as the task has them."""

    def metrics(self) -> dict[str, float | None]:
        """The numbers, by their names in ``metrics.jsonl``; None for one that is not finite."""
        known = {"validation_loss": self.loss, "validation_mae": self.mae}
        return {
            name: value if math.isfinite(value) else None
            for name, value in known.items()
            if value is not None
        }

    def shown(self) -> str:
        """The numbers for a person."""
        error = "" if self.mae is None else f", error {self.mae:.1f} of 255"
        return f"validation loss {self.loss:.4f}{error}"


class Validation:
    """Scores the averaged weights on the same samples, seeds and noise every time.

    Args:
        config: ``sample.*`` says how to sample and how many; all samples count for the loss.
        network: the averaged weights.
        raw: the weights that are trained; they only draw.
        schedule: the one trained with.
        dataset: samples never trained on.
        world: the samples are shared out among its processes.
        dtype: what the network computes in.
    """

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        raw: nn.Module,
        schedule: Schedule,
        dataset: TaskDataset,
        world: World,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.network, self.raw, self.schedule = config, network, raw, schedule
        self.dataset, self.world, self.dtype = dataset, world, dtype

    @torch.no_grad()
    def run(self, interrupts: Interrupts) -> Scores | None:
        """Score the network; None when a signal asked any process to stop."""
        # loss and its count, absolute error and its count, signals
        totals = torch.zeros(5, dtype=torch.float64)
        columns: dict[str, Tensor] = {}
        network = whole(self.network, self.config)
        with _noting(totals[4:]):
            for batch in self._batches(len(self.dataset), interrupts):
                per_sample = self._loss(network, batch)
                totals[:2] += torch.tensor([per_sample.double().sum(), len(per_sample)])
            for batch in self._batches(self.config.sample.count, interrupts):
                drawn = self._sample(network, batch, interrupts)
                hole = batch.get("mask", torch.ones_like(drawn[:, :1])).expand_as(drawn)
                error = ((drawn - batch["target"]).abs() * hole).double().sum()
                totals[2:4] += torch.tensor([error * 127.5, hole.double().sum()])
                _append(columns, _columns(batch, drawn))
        network = whole(self.raw, self.config)
        with _noting(totals[4:]):
            for batch in self._batches(self.config.sample.count, interrupts):
                _append(columns, {"raw": self._sample(network, batch, interrupts).cpu()})
        loss, count, error_sum, pixels, stopped = self.world.sum(
            totals.to(self.world.device, torch.float64)
        ).tolist()
        if stopped:
            return None
        mae = error_sum / max(pixels, 1) if condition_channels(self.config) else None
        return Scores(loss / max(count, 1), mae, _in_order(columns))

    def _batches(self, count: int, interrupts: Interrupts) -> Iterator[Batch]:
        """The first ``count`` samples, this process's share of them, in batches."""
        order = Batches(
            len(self.dataset),
            max(1, self.config.data.batch_size // self.world.size),
            stop=min(count, self.config.data.validation, len(self.dataset)),
            rank=self.world.rank,
            world=self.world.size,
        )
        for batch in Loader(self.dataset, order):
            if interrupts.signal:
                raise CancelledError
            yield {
                name: value.to(self.world.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }

    def _loss(self, network: nn.Module, batch: Batch) -> Tensor:
        device = self.world.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype is not torch.float32):
            return objective.loss(
                network,
                self.schedule,
                batch,
                batch["seed"],
                prediction=self.config.model.prediction,
                kind=self.config.train.loss,
                min_snr=self.config.train.min_snr,
                normalise=self.config.train.normalise_loss,
            ).per_sample

    def _sample(self, network: nn.Module, batch: Batch, interrupts: Interrupts) -> Tensor:
        options = self.config.sample
        sampler = Sampler(
            network,
            build_levels(self.config),
            solver=options.solver,
            prediction=self.config.model.prediction,
            eta=options.eta,
            guidance=options.guidance if "label" in batch else 1.0,
            reuse=options.reuse,
            dtype=self.dtype,
        )
        mask = batch.get("mask")
        return sampler.sample(
            batch["condition"],
            seeds=batch["seed"],
            channels=batch["target"].shape[1],
            known=None if mask is None else batch["target"],
            mask=mask,
            label=batch.get("label"),
            level=batch.get("level"),
            on_step=lambda *_: not interrupts.signal,
            preview="state",
        )


@contextmanager
def _noting(stopped: Tensor) -> Iterator[None]:
    """Count a cancellation in ``stopped`` [1] in place of raising it: the others have to know."""
    try:
        yield
    except CancelledError:
        stopped.fill_(1)


def _append(columns: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, column in more.items():
        columns[name] = torch.cat((columns.get(name, column[:0]), column))


def _in_order(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: columns[name] for name in _ORDER if name in columns}


def _columns(batch: Batch, drawn: Tensor) -> dict[str, Tensor]:
    if not batch["condition"].shape[1]:
        return {"sample": drawn.cpu()}
    found = {"sample": drawn.cpu(), "truth": batch["target"].cpu()}
    if batch["condition"].shape == drawn.shape:
        found = {"input": batch["condition"].cpu(), **found}
    return found
