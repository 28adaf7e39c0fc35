"""What a new run begins with where that is not nothing: weights, or a run of the published code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from palette import checkpoint as checkpoints
from palette import config as configs
from palette import upstream
from palette.checkpoint import Checkpoint, CheckpointError
from palette.config import Config
from palette.training.takeover import take_over


def elsewhere(
    config: Config,
    network: Mapping[str, Tensor],
    trained: Mapping[str, nn.Parameter],
    fresh: dict[str, Any],
    epoch_length: int,
) -> tuple[Checkpoint | None, list[str]]:
    """What ``train.init_from`` or ``train.resume_from`` names, as a checkpoint of ours.

    Args:
        config: what is trained.
        network: ``state_dict()`` of the freshly initialised network.
        trained: the parameters of the optimizer, by name, in its order.
        fresh: ``trainer`` part of a checkpoint at step 0.
        epoch_length: samples of an epoch, over all processes.

    Returns:
        The checkpoint, None where neither is named, and what is to be said about it.

    Raises:
        CheckpointError: nothing sound is there, or it does not fit; one line.
    """
    if config.train.resume_from:
        return take_over(config, trained, fresh, epoch_length)
    if not config.train.init_from:
        return None, []
    path = upstream.find_published(config.train.init_from)
    weights, notes = first_weights(path, config, network)
    return Checkpoint(path, config="", meta={}, model=weights, ema=weights, trainer=fresh), notes


def first_weights(
    path: Path, config: Config, network: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights to begin with, complete for a network, and what was and was not taken.

    Args:
        path: of a run, checkpoint or exported file of ours, or of published weights.
        config: what is trained.
        network: its ``state_dict()``, kept where the file has nothing.

    Raises:
        CheckpointError: the file is missing or damaged, or a shape in it cannot be adapted.
    """
    saved = None
    if upstream.is_published(path):
        state = checkpoints.load_torch(path)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds a {type(state).__name__}, not named weights")
    else:
        found = checkpoints.open_model(path)
        state, saved = found.state, configs.from_yaml(found.config, origin=f"{path}, its config")
    try:
        fitted = upstream.fit_state_dict(state, network)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    taken = len(network) - len(fitted.fresh)
    notes = [f"{path}: {fitted.format} weights, {taken} of {len(network)} tensors taken"]
    notes += [f"adapted: {change}" for change in fitted.changes]
    if fitted.fresh:
        notes.append(f"not there, begun anew: {', '.join(fitted.fresh)}")
    if fitted.unused:
        notes.append(f"not taken: {', '.join(fitted.unused)}")
    changed = _told_otherwise(config, fitted) if saved is None else _fixed(saved, config)
    if changed:
        notes.append(f"trained with other options: {'; '.join(changed)}")
    return fitted.weights, notes


def _fixed(saved: Config, config: Config) -> list[str]:
    """What no shape shows and the weights were nevertheless trained for."""
    return [
        text
        for text in configs.fixed_differences(saved, config)
        if text.startswith(("model.", "schedule."))
    ]


def _told_otherwise(config: Config, fitted: upstream.Fitted) -> list[str]:
    """The same of weights that came without a config."""
    known: dict[str, str | None] = {"embedding": upstream.EMBEDDINGS[fitted.format]}
    if config.model.kind == "unet" and fitted.format != "unet":
        known["attention_order"] = "legacy"
    return [
        f"model.{name}: {value} -> {now}"
        for name, value in known.items()
        if value is not None and (now := getattr(config.model, name)) != value
    ]
