"""``palette convert``: anybody's checkpoint as one file of ours, its config inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from palette import checkpoint as checkpoints
from palette import config as configs
from palette import upstream
from palette.checkpoint import CheckpointError
from palette.config import Config, ConfigError

_HEADS = {"palette": 32, "guided_diffusion": 64}  # channels of a head in the published networks
_SAMPLING = {"solver": "ddpm", "grid": "published"}
# How each program trains and samples where its config says nothing else.
_RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "palette": {
        "schedule": {"name": "linear", "steps": 2000, "start": 1e-6, "end": 0.01},
        "sample": {**_SAMPLING, "steps": 1000, "start": 1e-4, "end": 0.09},
    },
    "guided_diffusion": {
        "schedule": {"name": "linear", "steps": 1000, "start": 1e-4, "end": 0.02},
        "sample": {**_SAMPLING, "steps": 1000, "start": 1e-4, "end": 0.02},
    },
}


def convert(
    source: Path,
    target: Path,
    config: Path | None = None,
    *,
    image_size: int | None = None,
    weights: str = "ema",
) -> list[str]:
    """Write the weights of ``source`` to ``target``, one file that ``palette.load`` opens.

    Args:
        source: a checkpoint of published Palette, the SR3 repository or guided-diffusion, or a run
            or checkpoint directory of ours.
        target: ends in ``.safetensors``; replaced where it exists.
        config: ours or a published JSON one, for a checkpoint that is not ours. Without it the
            options are those that the weights show, and of the rest those that are usual; the
            report says so.
        image_size: side of the training images, where no config says it; default 256.
        weights: "ema", "raw" or the name of a further average, where ``source`` has them.

    Returns:
        The report, line by line.

    Raises:
        CheckpointError: the file is damaged, or weights are missing, unexpected or unfit; by name.
        ConfigError, ValueError: the config is wrong, or one is needed; an argument says nothing.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: must end in .safetensors, as what is written")
    source = upstream.find_published(source, weights)
    if config is not None and image_size is not None:
        raise ValueError(f"--image-size: found {image_size}; {config} says it")
    if not upstream.is_published(source):
        found = checkpoints.open_model(source, weights=weights)
        for name, given in (("config", config), ("image-size", image_size)):
            if given is not None:
                raise ValueError(f"--{name}: found {given}; {source} is of ours and says it")
        checkpoints.export(target, found.state, found.config, {"step": found.step})
        return [f"{source}: of ours, {len(found.state)} tensors", f"written: {target}"]
    report = []
    if config is None:
        options, assumed = _inferred(source, 256 if image_size is None else image_size)
        report.append(assumed)
    else:
        options = upstream.read_config(config, "test")
    converted = upstream.open_published(source, options)
    options = upstream.as_published(options, converted)
    meta = {"step": 0, "format": converted.format, "source": source.name}
    checkpoints.export(target, converted.weights, configs.to_yaml(options), meta)
    count = sum(weight.numel() for weight in converted.weights.values())
    return [
        f"{source}: {converted.format}, {len(converted.weights)} tensors, {count:,} parameters",
        "0 missing, 0 unexpected",
        *report,
        *(f"adapted: {change}" for change in converted.changes),
        *([f"dropped: {', '.join(converted.dropped)}"] if converted.dropped else []),
        f"written: {target}",
    ]


def _inferred(source: Path, image_size: int) -> tuple[Config, str]:
    """A config from the weights, and what they do not show."""
    state = checkpoints.load_torch(source)
    if not isinstance(state, dict):
        raise CheckpointError(f"{source}: holds a {type(state).__name__}, not named weights")
    try:
        form = upstream.recognise(state)
        if form not in _HEADS:
            raise ConfigError(f"{source}: {form} weights do not show their options; give --config")
        heads = _HEADS[form]
        found = upstream.infer_unet(_bare(state), image_size, head_channels=heads)
    except ConfigError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    for name in ("image_size", "in_channels", "out_channels"):
        del found[name]
    sections = {
        "model": {**found, "embedding": upstream.EMBEDDINGS[form]},
        "data": {"image_size": image_size},
        "train": {"precision": "float32"},
        **_RECIPES[form],
    }
    assumed = (
        f"assumed, for want of --config: images of {image_size} pixels, attention heads of {heads} "
        f"channels in the legacy order, the schedules of {form}"
    )
    return configs.from_sections(sections, origin=str(source)), assumed


def _bare(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights without the prefixes of the programs that saved them."""
    names = {name: str(name).removeprefix("module.") for name in state}
    return {
        bare.removeprefix("denoise_fn."): state[name]
        for name, bare in names.items()
        if isinstance(state[name], Tensor)
    }
