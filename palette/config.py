"""Every option once: name, type, default, range, unit and one line of explanation.

The sections are plain dataclasses read through OmegaConf, so ``1e-4`` is a number and lists are
checked element by element. A mistake is one line that names the file and line, the full key, what
was found and what would be right.
"""

# ruff: noqa: RUF009 - option() returns a dataclasses.field, which is what RUF009 asks for

from __future__ import annotations

import dataclasses
import difflib
import functools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from palette._config_option import Option, option
from palette._config_task import Task as Task
from palette._config_task import check_task
from palette._config_text import ConfigError as ConfigError
from palette._config_text import entries, override, read_text
from palette._config_train import Train as Train


def _sources() -> list[str]:
    from palette.data.sources import SOURCES

    return sorted(SOURCES)


@dataclasses.dataclass
class Run:
    dir: str = option("runs/default", "directory that receives everything the run writes")
    seed: int = option(
        0, "every random choice is a function of it and the sample", low=0, high=2**63 - 1
    )
    tensorboard: bool = option(True, "write TensorBoard logs too, where it is installed")
    wandb: str = option("", "project of Weights & Biases that gets the same; empty: none")


@dataclasses.dataclass
class Model:
    kind: Literal["unet", "sr3"] = option("unet", "architecture of the network", fixed=True)
    # No network comes near these upper limits; they bound what the config of a stranger can cost.
    channels: int = option(64, "width of the first level", low=1, high=4096, fixed=True)
    channel_mults: list[int] = option(
        [1, 2, 4, 8], "width of levels in units of channels", low=1, high=64, longest=16, fixed=True
    )
    res_blocks: int = option(2, "residual blocks per level", low=1, high=32, fixed=True)
    attention_resolutions: list[int] = option(
        [32, 16, 8], "feature maps that attend", unit="pixels", low=1, empty=True, fixed=True
    )
    attention: Literal["global", "local", "dilated", "resblocks", "none"] = option(
        "global",
        "of these maps: all of it, or windows of half its sides; or, as in table 5 of the paper, "
        "dilated or plain residual blocks in place of attention; or nothing",
        fixed=True,
    )
    heads: int = option(1, "attention heads where head_channels is null", low=1, fixed=True)
    head_channels: int | None = option(
        32, "channels per attention head; null: use heads", low=1, fixed=True
    )
    heads_upsample: int | None = option(
        None, "heads on the way up; null: as heads", low=1, fixed=True
    )
    attention_order: Literal["new", "legacy"] = option(
        "new", "how the heads lie in the packed query, key and value", fixed=True
    )
    scale_shift: bool = option(
        True, "noise level scales and shifts each normalisation; false: is added", fixed=True
    )
    resblock_updown: bool = option(True, "resize inside residual blocks", fixed=True)
    conv_resample: bool = option(True, "convolve when resizing outside residual blocks", fixed=True)
    embedding: Literal["log_snr", "gamma", "sqrt_gamma", "timestep"] = option(
        "log_snr",
        "what of the noise level is embedded; the others are for Palette, SR3 and ADM weights",
        fixed=True,
    )
    norm_groups: int = option(32, "groups of each normalisation, of sr3 only", low=1, fixed=True)
    noise_level_embedding: bool = option(
        True, "tell the network its noise level, of sr3 only", fixed=True
    )
    prediction: Literal["epsilon", "x0", "v", "regression"] = option(
        "epsilon", "what is predicted; regression: the target, in one evaluation", fixed=True
    )
    num_classes: int | None = option(
        None, "classes to condition on; null: no labels", low=1, high=10**6, fixed=True
    )
    dropout: float = option(0.0, "share of activations dropped in training", low=0, below=1)
    embedding_dropout: float = option(
        0.0,
        "share of the embedded noise level dropped in training (quickgrid/pytorch-diffusion: 0.1)",
        low=0,
        below=1,
    )
    init: Literal[
        "default", "kaiming", "normal", "xavier", "xavier_uniform", "orthogonal", "none"
    ] = option("default", "first weights; default: zero output layers; others: as published")
    init_gain: float = option(0.02, "of model.init normal, xavier and orthogonal", above=0)
    checkpoint: bool = option(False, "recompute activations in backward to save memory")


@dataclasses.dataclass
class Schedule:
    name: Literal[
        "linear", "quad", "quadratic", "const", "warmup10", "warmup50", "jsd", "cosine", "sigmoid"
    ] = option("linear", "how beta goes from start to end", fixed=True)
    steps: int = option(2000, "noise levels of the training grid", low=2, high=10**6, fixed=True)
    start: float = option(1e-6, "first beta", above=0, below=1, fixed=True)
    end: float = option(0.01, "last beta", above=0, below=1, fixed=True)
    cosine_offset: float = option(8e-3, "of the cosine schedule", above=0, below=1, fixed=True)


@dataclasses.dataclass
class Data:
    source: str = option(
        "photos",
        "photos: those in scikit-image; folder, list, shards (tar), pairs, classes: at data.path",
        known=_sources,
    )
    path: str = option("", "folder of images, text file of paths, or tar files by path or pattern")
    conditions: str = option("", "of pairs: folder of conditions named as the images at data.path")
    names: str = option("", "of pairs: text file of names; empty: all")
    limit: int | None = option(None, "use the first so many pictures only; null: all", low=1)
    image_size: int | list[int] = option(
        64, "side, or [height, width]", unit="pixels", low=1, high=65536, pair=True, fixed=True
    )
    batch_size: int = option(16, "samples per step, over all processes", low=1)
    workers: int = option(0, "loader processes; 0 loads in the training process", low=0, high=512)
    validation: int = option(64, "samples held out, never trained on", low=0)
    validation_pictures: int | None = option(
        None, "pictures these come from; null: a tenth of all, not more than samples", low=1
    )
    samples_per_epoch: int = option(4096, "crops per epoch of data.source=photos", low=1)
    fit: Literal["largest", "zoom", "center", "squash"] = option(
        "largest",
        "of a picture: the largest crop, a random one down to an eighth, the middle, or all of it",
    )
    flip: bool = option(True, "mirror half of the training samples")
    shuffle: bool = option(True, "another order in each epoch")
    drop_last: bool = option(
        False, "end each epoch with its last full batch; false: batches reach into the next"
    )


@dataclasses.dataclass
class Sample:
    solver: Literal["dpmpp_2m", "dpmpp_2m_sde", "ddim", "ddpm", "unipc"] = option(
        "dpmpp_2m_sde", "reverse process"
    )
    steps: int = option(25, "network evaluations per image", unit="steps", low=1, high=10**6)
    eta: float = option(0.0, "noise of ddim: 0 none, 1 ancestral", low=0, high=1)
    guidance: float = option(
        1.0, "weight of the label; 1: as trained, above: more typical of its class", low=0, high=100
    )
    reuse: int = option(
        1,
        "every so many evaluations one is whole, the others reuse its deep features; 1: all whole",
        low=1,
    )
    augmentation: float = option(
        0.0, "of upscale: noise mixed into the input, as share of variance", low=0, below=1
    )
    grid: Literal["log_snr", "published"] = option(
        "log_snr",
        "noise levels: even in log-SNR within those trained on, or a beta schedule of its own",
    )
    start: float = option(1e-4, "first beta of sample.grid=published", above=0, below=1)
    end: float = option(0.09, "last beta of sample.grid=published", above=0, below=1)
    count: int = option(8, "pictures in each grid of samples", low=1, high=1024)


@dataclasses.dataclass
class Summary:
    crops: int = option(0, "held-out crops in the tables at the end; 0 writes none", low=0)
    samples: int = option(8, "samples of each of these crops", low=1, high=1024)


@dataclasses.dataclass
class Config:
    run: Run = dataclasses.field(default_factory=Run)
    model: Model = dataclasses.field(default_factory=Model)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    task: Task = dataclasses.field(default_factory=Task)
    data: Data = dataclasses.field(default_factory=Data)
    train: Train = dataclasses.field(default_factory=Train)
    sample: Sample = dataclasses.field(default_factory=Sample)
    summary: Summary = dataclasses.field(default_factory=Summary)


@functools.cache
def options() -> dict[str, Option]:
    """Every option by its full key, in the order of the sections."""
    found = {}
    for section, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            key = f"{section}.{field.name}"
            found[key] = Option(key, hints[field.name], field)
    return found


def _texts() -> set[str]:
    return {key for key, known in options().items() if known.type is str}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply ``section.option=value`` overrides.

    Raises:
        ConfigError: the file is missing or unreadable, or anything in it is wrong.
    """
    return from_yaml(read_text(Path(path)), origin=str(path), overrides=overrides)


def from_yaml(text: str, *, origin: str = "config", overrides: Sequence[str] = ()) -> Config:
    """A config from YAML text. ``origin`` names the text in errors.

    Raises:
        ConfigError: in one line, with the line number, the full key and what would be right.
    """
    found = (
        (key, value, where)
        for key, value, where in entries(text, origin, _texts())
        if not (value is None and key in Config.__dataclass_fields__)  # nothing below a section
    )
    return _built([*found, *(override(item, _texts()) for item in overrides)], origin)


def from_sections(
    sections: Mapping[str, Mapping[str, Any]],
    *,
    origin: str = "config",
    overrides: Sequence[str] = (),
) -> Config:
    """A config from options by section, as another program's config is translated into.

    Raises:
        ConfigError: in one line, with the full key and what would be right.
    """
    found = [
        (f"{section}.{name}", value, origin)
        for section, values in sections.items()
        for name, value in values.items()
    ]
    return _built([*found, *(override(item, _texts()) for item in overrides)], origin)


def _built(found: Iterable[tuple[str, Any, str]], origin: str) -> Config:
    """The config of (key, value, where it stands) entries; later ones replace earlier ones."""
    sections: dict[str, Any] = {}
    for key, value, where in found:
        _assign(sections, key, value, where)
    read: dict[str, Any] = {name: OmegaConf.to_object(node) for name, node in sections.items()}
    result = Config(**read)
    _check_together(result, origin)
    return result


def to_yaml(config: Config) -> str:
    """The whole config as YAML text; ``from_yaml`` gives an equal one back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def fixed_differences(before: Config, after: Config) -> list[str]:
    """Options that differ and cannot be changed on resume, as ``key: before -> after``."""
    found = []
    for key, known in options().items():
        section, name = key.split(".")
        old, new = (getattr(getattr(config, section), name) for config in (before, after))
        if old != new and known.field.metadata["fixed"]:
            found.append(f"{key}: {old} -> {new}")
    return found


def help_text() -> str:
    """Every option with type, range, default and explanation: ``palette train --help-config``."""
    lines: list[str] = []
    section = ""
    for key, known in options().items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"{section}:"] if lines else [f"{section}:"]
        facts = known.field.metadata
        unit = f" [{facts['unit']}]" if facts["unit"] else ""
        default = "null" if known.default is None else known.default
        default = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {key} = {default if default != '' else repr('')}{unit}")
        fixed = "; fixed once the run has started" if facts["fixed"] else ""
        text = f"{facts['doc']} ({known.wants()}{fixed})"
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _assign(sections: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one option in its section's OmegaConf node, made when first written to."""
    known = options()
    if key not in known:
        raise ConfigError(f"{where}: {_unknown(key, known)}")
    complaint = f"{where}: {key} must be {known[key].wants()}; got {_short(value)}"
    if known[key].type is bool and not isinstance(value, bool):
        raise ConfigError(complaint)
    section, name = key.split(".")
    if section not in sections:
        sections[section] = OmegaConf.structured(get_type_hints(Config)[section])
    try:
        OmegaConf.update(sections[section], name, value)
        converted: Any = OmegaConf.to_container(sections[section], throw_on_missing=True)
        accepted = known[key].accepts(converted[name])
    except (OmegaConfBaseException, ValueError, OverflowError):
        raise ConfigError(complaint) from None
    if not accepted:
        raise ConfigError(complaint)


def _unknown(key: str, known: dict[str, Option]) -> str:
    sections = list(Config.__dataclass_fields__)
    if key in sections:
        example = next(full for full in known if full.startswith(f"{key}."))
        return f"{key} is a section; write its options below it, such as {example}"
    section, _, name = key.rpartition(".")
    # A slip of the finger in this section, then a right name in the wrong section, then a guess.
    nearest = (
        _closest(name, [full for full in known if full.startswith(f"{section}.")])
        or _closest(name, list(known))
        or difflib.get_close_matches(key, list(known), n=1)
    )
    hint = f"did you mean {nearest[0]}?" if nearest else "see palette train --help-config"
    return f"unknown option {_short(key)[1:-1]}; {hint}"


def _closest(name: str, keys: list[str]) -> list[str]:
    names = {key.split(".")[1]: key for key in reversed(keys)}
    return [names[close] for close in difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_together(config: Config, origin: str) -> None:
    """What no single option can tell."""
    if config.schedule.start > config.schedule.end:
        raise ConfigError(
            f"{origin}: schedule.start must not exceed schedule.end; "
            f"got {config.schedule.start} and {config.schedule.end}"
        )
    if config.model.prediction == "regression" and config.sample.steps != 1:
        raise ConfigError(
            f"{origin}: sample.steps must be 1 with model.prediction=regression; "
            f"got {config.sample.steps}"
        )
    if config.model.prediction == "regression" and config.train.min_snr is not None:
        raise ConfigError(
            f"{origin}: train.min_snr must be null with model.prediction=regression, which knows "
            f"one noise level; got {config.train.min_snr}"
        )
    if (
        config.data.source in ("folder", "list", "shards", "pairs", "classes")
        and not config.data.path
    ):
        raise ConfigError(f"{origin}: data.path is needed with data.source={config.data.source}")
    if config.data.source != "pairs":
        for name in ("conditions", "names"):
            if getattr(config.data, name):
                raise ConfigError(f"{origin}: data.{name} goes with data.source=pairs alone")
    if config.train.init_from and config.train.resume_from:
        raise ConfigError(
            f"{origin}: train.init_from begins a training and train.resume_from continues one; "
            "give one of them"
        )
    if config.data.batch_size % config.train.accumulate:
        raise ConfigError(
            f"{origin}: train.accumulate must divide data.batch_size={config.data.batch_size}; "
            f"got {config.train.accumulate}"
        )
    if config.train.compile and config.train.parallel == "fsdp":
        raise ConfigError(f"{origin}: train.compile goes with train.parallel=ddp; got fsdp")
    if config.sample.reuse > 1 and config.model.kind == "sr3":
        raise ConfigError(
            f"{origin}: sample.reuse must be 1 with model.kind=sr3; got {config.sample.reuse}"
        )
    if config.model.kind == "sr3":
        for name, only in (("attention", "global"), ("embedding_dropout", 0.0)):
            if getattr(config.model, name) != only:
                raise ConfigError(f"{origin}: model.{name} must be {only} with model.kind=sr3")
    check_task(config.task, config.model.kind, origin)
    if config.train.process_every and config.task.name != "generate":
        raise ConfigError(f"{origin}: train.process_every must be 0 unless task.name=generate")
    if config.summary.crops and config.task.name not in ("inpaint", "uncrop"):
        raise ConfigError(f"{origin}: summary.crops must be 0 with task.name={config.task.name}")
    if not config.run.dir.strip():
        raise ConfigError(f"{origin}: run.dir must name a directory; got {config.run.dir!r}")
