"""A run that the published code began, taken up where it stopped.

It left ``<E>_Network.pth``, ``<E>_Network_ema.pth`` and ``<E>.state``; the path given is that of
all three without their endings, as the published ``resume_state`` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palette import upstream
from palette.build import build_network
from palette.checkpoint import Checkpoint, CheckpointError, load_torch
from palette.config import Config


def take_over(
    config: Config, trained: Mapping[str, nn.Parameter], fresh: dict[str, Any], epoch_length: int
) -> tuple[Checkpoint, list[str]]:
    """The published run at ``config.train.resume_from`` as a checkpoint of ours.

    Args:
        config: what is trained; its network is that of the weights.
        trained: the parameters of the optimizer, by name, in its order.
        fresh: ``trainer`` part of a checkpoint at step 0.
        epoch_length: samples of an epoch, over all processes.

    Training goes on after the published epochs and optimizer steps. Where ``<E>.state`` is missing
    only the weights are taken, and where the averaged weights are missing the average begins at the
    others.

    Returns:
        The checkpoint, and what is to be said about it.

    Raises:
        CheckpointError: the weights are missing, or a file is damaged or of another network.
    """
    prefix = config.train.resume_from
    weights, average, state = (
        Path(f"{prefix}{ending}") for ending in ("_Network.pth", "_Network_ema.pth", ".state")
    )
    model = upstream.open_published(weights, config).weights
    notes = []
    ema = model
    if average.exists():
        ema = upstream.open_published(average, config).weights
    else:
        notes.append(f"{average}: missing; the average begins at the weights")
    trainer = dict(fresh)
    if state.exists():
        trainer |= _position(state, config, trained, fresh["optimizer"], epoch_length)
    else:
        notes.append(f"{state}: missing; only the weights are taken")
    taken = Checkpoint(Path(prefix), config="", meta={}, model=model, ema=ema, trainer=trainer)
    return taken, notes


def _position(
    path: Path,
    config: Config,
    trained: Mapping[str, nn.Parameter],
    optimizer: Mapping[str, Any],
    epoch_length: int,
) -> dict[str, Any]:
    """Step, position in the data and moments of a published training state."""
    with torch.device("meta"):
        parameters = dict(build_network(config).named_parameters())
    state = load_torch(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a training state")
    try:
        found = upstream.convert_training_state(state, parameters)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    # The published iteration counts the samples of one process, and those of validations; what
    # Adam counts is the optimizer's steps, as we do.
    counts = [int(slot["step"]) for slot in found.moments.values() if "step" in slot]
    step = max(counts, default=found.iteration // config.data.batch_size)
    slots = {n: found.moments[name] for n, name in enumerate(trained) if found.moments[name]}
    return {
        "optimizer": {**optimizer, "state": slots},
        "step": step,
        "samples": found.epoch * epoch_length,
        "ema_updates": step,
    }
