"""Published files on disk: a checkpoint and the config it was trained with."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from palette import config as configs
from palette.build import build_network
from palette.checkpoint import CheckpointError, load_torch
from palette.config import Config, ConfigError
from palette.upstream.config import to_config
from palette.upstream.formats import Converted, convert_state_dict
from palette.upstream.jsonc import read_json_config


def read_config(path: str | PathLike[str], phase: str = "train") -> Config:
    """A config of ours, or a published one (``.json``, with ``//`` comments) in our options.

    Args:
        path: the file.
        phase: "train" or "test": whose data set of a published config is meant.

    Raises:
        ConfigError: in one line, with the file and the key.
    """
    if Path(path).suffix != ".json":
        return configs.load(Path(path))
    try:
        return configs.from_sections(to_config(read_json_config(Path(path)), phase=phase))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None


def is_published(path: str | PathLike[str]) -> bool:
    """Whether a file is a PyTorch checkpoint, as other programs write them."""
    return Path(path).suffix in {".pth", ".pt", ".ckpt"}


def find_published(path: str | PathLike[str], weights: str = "ema") -> Path:
    """The file behind a published ``resume_state``, its path without ``_Network_ema.pth``.

    Any other path is given back as it is. The averaged weights are taken where ``weights`` is
    "ema" and they are there, else the others.

    Raises:
        CheckpointError: ``weights`` has another name.
        ValueError: ``weights`` is not "ema", the default, and the path is that of one file.
    """
    if is_published(path) and weights != "ema":
        raise ValueError(
            f"--weights: found {weights}; {path} holds one kind of weights, leave it out"
        )
    average, raw = (Path(f"{path}_Network{kind}.pth") for kind in ("_ema", ""))
    if Path(path).exists() or not (average.exists() or raw.exists()):
        return Path(path)
    if weights not in ("ema", "raw"):
        raise CheckpointError(f"{path}: a published checkpoint has no {weights} weights")
    return average if weights == "ema" and average.exists() else raw


def as_published(config: Config, converted: Converted) -> Config:
    """The config as these weights need it: told the noise level in their way, and in float32.

    One config serves several formats: the SR3 repository's weights are told sqrt(gamma).
    """
    told = converted.embedding or config.model.embedding
    precision = "float32" if config.train.precision == "auto" else config.train.precision
    return replace(
        config,
        model=replace(config.model, embedding=told),
        train=replace(config.train, precision=precision),
    )


def open_published(path: str | PathLike[str], config: Config) -> Converted:
    """The weights of a published checkpoint, complete for the network of ``config``.

    Takes ``<E>_Network.pth``, ``<E>_Network_ema.pth``, and checkpoints of the SR3 repository and of
    guided-diffusion.

    Raises:
        CheckpointError: the file is damaged or malicious, or its weights do not fit: one line with
            the name of every tensor at fault.
    """
    with torch.device("meta"):
        expected = build_network(config).state_dict()
    state = load_torch(Path(path))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not named weights")
    try:
        return convert_state_dict(state, expected)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
