"""A config to run: of ours, or a published one with its epochs turned into steps."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from palette import config as configs
from palette.build import build_datasets, epoch_length
from palette.config import Config, ConfigError
from palette.upstream.config import Settings, settings, to_config
from palette.upstream.jsonc import read_json_config


def read_run(
    path: str | PathLike[str],
    phase: str = "train",
    *,
    batch_size: int | None = None,
    gpus: int | None = None,
    debug: bool = False,
    overrides: Sequence[str] = (),
) -> tuple[Config, Settings | None]:
    """A config of ours (its settings None), or a published one, with everything it asks for.

    Args:
        path: YAML, or ``.json`` with ``//`` comments.
        phase: "train" or "test".
        batch_size, gpus, debug: as for ``to_config``; ``gpus`` says nothing to a config of ours.
        overrides: ``section.option=value``; they come last.

    Raises:
        ConfigError, ValueError: in one line, with the file and the key; the data are looked at too.
    """
    if Path(path).suffix != ".json":
        if debug:
            raise ConfigError(f"{path}: -d is for published configs (.json); this is one of ours")
        size = [] if batch_size is None else [f"data.batch_size={batch_size}"]
        return configs.load(Path(path), [*size, *overrides]), None
    try:
        published = read_json_config(Path(path))
        found = settings(published, phase=phase, gpus=gpus, debug=debug)
        sections = to_config(published, phase=phase, batch_size=batch_size, gpus=gpus, debug=debug)
        if phase == "train":
            _measure(sections, found, configs.from_sections(sections, overrides=overrides))
        return configs.from_sections(sections, overrides=overrides), found
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None


def _measure(sections: dict[str, Any], found: Settings, config: Config) -> None:
    """Turn shares and epochs into pictures and steps, in place; ``config`` names the data."""
    pictures = len(build_datasets(config, split=False)[0])
    if found.debug_split is not None:
        split = found.debug_split
        pictures = min(split if isinstance(split, int) else int(pictures * split), pictures)
        sections["data"]["limit"] = max(pictures, 1)
    split = found.validation_split
    held_out = split if isinstance(split, int) else int(pictures * split)
    sections["data"] |= {"validation": held_out, "validation_pictures": held_out or None}
    samples = epoch_length(max(pictures - held_out, 1), config)
    steps = -(-samples // config.data.batch_size)  # of an epoch
    train = sections["train"]
    train |= {
        "steps": min(train["steps"], found.epochs * steps),
        "save_every": found.save_epochs * steps,
        "sample_every": found.validate_epochs * steps,
    }
