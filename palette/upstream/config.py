"""Published configs as options of ours.

``to_config`` gives the nested dict that our YAML would hold; what the published code has beside
that (epochs, the test schedule, the checkpoint to continue from) is in ``settings``. Published
classes are recognised by name and never imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palette.config import ConfigError
from palette.models.initial import INIT_TYPES
from palette.upstream.jsonc import Reader
from palette.upstream.options import schedule_options, unet_options

# Published data set -> (task, side of its images where the config names none).
_DATASETS = {
    "InpaintDataset": ("inpaint", 256),
    "UncroppingDataset": ("uncrop", 256),
    "ColorizationDataset": ("colorize", 224),
}
_MASKS = {
    "inpaint": {
        "bbox": "box",
        "center": "center",
        "free_form": "free_form",
        "irregular": "irregular",
        "hybrid": "hybrid",
    },
    "uncrop": {
        "onedirection": "one_direction",
        "fourdirection": "rectangle",  # whatever its name says
        "hybrid": "uncrop_published",
    },
}
_LOADER = ("batch_size", "num_workers", "shuffle", "drop_last", "pin_memory")
_LOSSES = {"mse_loss": "l2"}
_SR3_DEFAULTS = {"norm_groups": 32, "noise_level_embedding": True}
_COSINE_OFFSET = 8e-3


@dataclass(frozen=True)
class Settings:
    """What a published config says that is no option of ours.

    Attributes:
        name: of the run: phase (or debug, finetune) and experiment.
        network: arguments of ``upstream.Network``.
        sample_num: snapshots of each reverse process.
        fit: how pictures are brought to size: squashed, without keeping their proportions.
        data_length: use only the first so many images; None: all.
        file_list: text file with the images' names; None: all of the folder.
        debug_split: use only so many images (int) or such a share of them (float); None: all.
        validation_split: images held out, as a count (int) or a share (float).
        drop_last: leave out a last batch that is not full.
        epochs, samples: training ends at the first of the two (samples seen per process).
        validate_epochs, save_epochs: epochs between validations and between checkpoints.
        ema_start, ema_every: samples before the first, and between two updates of the EMA weights.
        resume: path of a published checkpoint without its ending, such as ".../checkpoint/200".
        finetune_norm: train only the normalisation layers.
        processes: one for each of the published ``gpu_ids``.
    """

    name: str
    network: dict[str, Any]
    sample_num: int
    fit: str
    data_length: int | None
    file_list: str | None
    debug_split: int | float | None
    validation_split: int | float
    drop_last: bool
    epochs: int
    samples: int
    validate_epochs: int
    save_epochs: int
    ema_start: int
    ema_every: int
    resume: str | None
    finetune_norm: bool
    processes: int


def network_arguments(published: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``upstream.Network``: unet, beta_schedule, module_name, init_type, gain.

    Raises:
        ConfigError: they are missing or not those of the published Network.
    """
    name, found = Reader(published).named("model.which_networks.0")
    if name != "Network":
        raise ConfigError(f"model.which_networks.0: {name!r} is not the published Network")
    known = ("unet", "beta_schedule", "module_name", "init_type", "gain")
    for argument in found:
        if argument not in known:
            raise ConfigError(f"{found.full(argument)}: unknown; Network has {', '.join(known)}")
    for argument in ("unet", "beta_schedule"):
        if not isinstance(found.get(argument), dict):
            raise ConfigError(f"{found.full(argument)}: must be an object")
    return {"module_name": "sr3", **{argument: found.get(argument) for argument in found}}


def to_config(
    published: Mapping[str, Any],
    *,
    phase: str = "train",
    batch_size: int | None = None,
    gpus: int | None = None,
    debug: bool = False,
) -> dict[str, dict[str, Any]]:
    """Our options, section by section, for a published config.

    Args:
        published: from ``read_json_config``.
        phase: "train" or "test" (published ``-p``): whose data set is meant.
        batch_size: per process, in place of the config's (``-b``).
        gpus: number of processes, in place of the config's ``gpu_ids`` (``-gpu``).
        debug: the options under ``debug`` replace those under ``train`` (``-d``).

    What depends on the number of pictures is missing: ``recipe.read_run`` looks at them.
    Our batch size is that of all processes together, our steps are optimizer steps instead of
    samples, and the published optimizer has no warm-up, no clipping and no mirrored images.

    Raises:
        ConfigError: an option is missing, of another type, or asks for what is not supported.
    """
    found = settings(published, phase=phase, gpus=gpus, debug=debug)
    reader = Reader(published)
    loader = f"datasets.{phase}.dataloader.args"
    per_process = batch_size or reader.integer(f"{loader}.batch_size", 1, low=1)
    run: dict[str, Any] = {"dir": f"{reader.text('path.base_dir', 'experiments')}/{found.name}"}
    seed = reader.integer("seed", -1)
    if seed >= 0:  # below 0 the published code draws its own
        run["seed"] = seed
    task, data = _task_and_data(reader, phase, found)
    data |= _loading(reader, loader, found)
    data["batch_size"] = per_process * found.processes
    test = _schedule(found.network, "test")
    return {
        "run": run,
        "model": _model(found.network, data["image_size"]) | _initial(found.network),
        "schedule": _schedule(found.network, "train"),
        "task": task,
        "data": data,
        "train": {
            **_steps(found, per_process, _in_training(reader, "log_iter", debug, default=1)),
            "precision": "float32",
            "normalise_loss": False,
            "norms_only": found.finetune_norm,
            "resume_from": (found.resume or "") if phase == "train" else "",
            **_optimizer(reader),
        },
        "sample": {
            "solver": "ddpm",
            "grid": "published",
            **{name: test[name] for name in ("steps", "start", "end") if name in test},
        },
    }


def settings(
    published: Mapping[str, Any],
    *,
    phase: str = "train",
    gpus: int | None = None,
    debug: bool = False,
) -> Settings:
    """What a published config says beside our options; arguments and errors as ``to_config``."""
    if phase not in ("train", "test"):
        raise ConfigError(f"phase: {phase!r} is neither 'train' nor 'test'")
    reader = Reader(published)
    model, arguments = reader.named("model.which_model")
    if model != "Palette":
        raise ConfigError(f"model.which_model: {model!r} is not the published Palette")
    _, dataset = reader.named(f"datasets.{phase}.which_dataset")
    length = dataset.integer("data_len", -1)
    finetune = reader.flag("finetune_norm", False)
    prefix = "debug" if debug else "finetune" if finetune else phase
    cards = reader.numbers("gpu_ids", [0])
    loader = f"datasets.{phase}.dataloader"
    return Settings(
        name=f"{prefix}_{reader.text('name')}",
        network=network_arguments(published),
        sample_num=arguments.integer("sample_num", 8, low=1),
        fit="squash",
        data_length=length if length > 0 else None,
        file_list=dataset.text("data_flist", "") or None,
        debug_split=reader.number("debug.debug_split", 1.0, low=0) if debug else None,
        validation_split=reader.number(f"{loader}.validation_split", 0, low=0),
        drop_last=reader.flag(f"{loader}.args.drop_last", False),
        epochs=_in_training(reader, "n_epoch", debug, default=10**8),
        samples=_in_training(reader, "n_iter", debug, default=10**8),
        validate_epochs=_in_training(reader, "val_epoch", debug, default=1),
        save_epochs=_in_training(reader, "save_checkpoint_epoch", debug, default=1),
        ema_start=arguments.integer("ema_scheduler.ema_start", 1, low=0),
        ema_every=arguments.integer("ema_scheduler.ema_iter", 1, low=1),
        resume=reader.text("path.resume_state", "") or None,
        finetune_norm=finetune,
        processes=max(len(cards) if gpus is None else gpus, 1),
    )


def _steps(found: Settings, per_process: int, log_every: int) -> dict[str, Any]:
    """Training options counted in steps of ``per_process`` samples, published in samples."""
    return {
        "steps": max(found.samples // per_process, 1),
        "log_every": max(log_every // per_process, 1),
        # Published after the steps whose sum of samples is above the one and a multiple of the
        # other.
        "ema_start": found.ema_start // per_process,
        "ema_every": found.ema_every // math.gcd(found.ema_every, per_process),
        "ema_warmup": False,
    }


def _in_training(reader: Reader, name: str, debug: bool, *, default: int) -> int:
    """An option of ``train``, or of ``debug`` where that is on and has it."""
    value = reader.integer(f"train.{name}", default, low=1)
    return reader.integer(f"debug.{name}", value, low=1) if debug else value


def _model(network: Mapping[str, Any], image_size: int | list[int]) -> dict[str, Any]:
    """Our model section, its attention layers named by their pixels at the data's image size."""
    where = "model.which_networks.0.args"
    try:
        options = unet_options(network["module_name"], network["unet"], image_size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    channels = (options.pop("in_channels"), options.pop("out_channels"))
    if channels != (6, 3):
        raise ConfigError(
            f"{where}.unet: in_channel and out_channel are {channels[0]} and {channels[1]}; "
            "a condition and an image of 3 channels each make 6 and 3"
        )
    del options["image_size"]
    for name, default in _SR3_DEFAULTS.items():
        if options.get(name) == default:
            del options[name]
    kind = "sr3" if network["module_name"] == "sr3" else "unet"
    return {"kind": kind, **options, "channel_mults": list(options["channel_mults"])}


def _initial(network: Mapping[str, Any]) -> dict[str, Any]:
    """How a new network is initialised; the published default is kaiming."""
    kind, gain = network.get("init_type", "kaiming"), network.get("gain", 0.02)
    if kind not in INIT_TYPES:
        raise ConfigError(
            f"model.which_networks.0.args.init_type: {kind!r} is unknown; "
            f"there is {', '.join(INIT_TYPES)}"
        )
    return {"init": kind, "init_gain": gain}


def _schedule(network: Mapping[str, Any], phase: str) -> dict[str, Any]:
    try:
        options = schedule_options(network["beta_schedule"], phase)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.which_networks.0.args: {error}") from None
    if options.get("cosine_offset") == _COSINE_OFFSET:
        del options["cosine_offset"]
    return options


def _loading(reader: Reader, loader: str, found: Settings) -> dict[str, Any]:
    """How samples are made and loaded; memory is pinned where there is a GPU."""
    arguments = reader.inside(loader)
    for name in arguments:
        if name not in _LOADER:
            raise ConfigError(
                f"{arguments.full(name)}: not supported; there is {', '.join(_LOADER)}"
            )
    split = found.validation_split
    return {
        "workers": arguments.integer("num_workers", 0, low=0),
        "shuffle": arguments.flag("shuffle", True),
        "drop_last": found.drop_last,
        "limit": found.data_length,
        "fit": found.fit,
        "flip": False,
        **({"validation": split} if isinstance(split, int) else {}),
    }


def _task_and_data(
    reader: Reader, phase: str, found: Settings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our task and data sections for the data set of a phase."""
    key = f"datasets.{phase}.which_dataset"
    name, dataset = reader.named(key)
    if name not in _DATASETS:
        raise ConfigError(f"{key}: {name!r} is unknown; there is {', '.join(_DATASETS)}")
    task, side = _DATASETS[name]
    path = dataset.text("data_root")
    data = _source(path, found.file_list if task == "colorize" else None)
    data["image_size"] = dataset.get("image_size", side)
    if task not in _MASKS:
        return {"name": task}, data
    mode_key = "mask_config.mask_mode" if dataset.get("mask_config", None) else "mask_mode"
    mode = dataset.text(mode_key, "hybrid")
    if task == "uncrop" and mode == "manual":
        return {"name": task, "mask": _manual_mask(dataset, side)}, data
    if mode not in _MASKS[task]:
        raise ConfigError(
            f"{dataset.full(mode_key)}: {mode!r} is not supported for {name}; "
            f"there is {', '.join(_MASKS[task])}"
        )
    return {"name": task, "mask": _MASKS[task][mode]}, data


def _manual_mask(dataset: Reader, side: int) -> str:
    """The hole that ``shape`` gives (top, left, height, width in pixels) as a box in shares."""
    size = dataset.numbers("image_size", [side, side])
    if len(size) != 2 or min(size) < 1:
        where = dataset.full("image_size")
        raise ConfigError(f"{where}: must be [height, width], at least 1 each; got {size}")
    height, width = size
    shape = dataset.numbers("mask_config.shape")
    if len(shape) != 4:
        where = dataset.full("mask_config.shape")
        raise ConfigError(f"{where}: must be [top, left, height, width]; got {shape}")
    top, left, rows, columns = shape
    corners = (left / width, top / height, (left + columns) / width, (top + rows) / height)
    return ",".join(str(corner) for corner in corners)


def _source(path: str, names: str | None) -> dict[str, Any]:
    """Where the pictures are: pairs below ``path`` where ``names`` are listed, or single ones.

    Pictures to be coloured may also come alone, as a folder or a list; their grey is made here.
    """
    alone = Path(path).is_dir() and not (Path(path) / "color").is_dir()
    if names is None or alone:
        listed = names if names is not None and os.path.isfile(names) else path
        return {"source": "list" if _is_list(listed) else "folder", "path": listed}
    return {"source": "pairs", "path": path, "names": names}


def _is_list(path: str) -> bool:
    """Whether the published code would read this path as a text file of image paths."""
    return Path(path).is_file() or Path(path).suffix in (".flist", ".txt")


def _optimizer(reader: Reader) -> dict[str, Any]:
    """Our training options for the published optimizer, loss and EMA."""
    loss, _ = reader.named("model.which_losses.0")
    if loss not in _LOSSES:
        known = ", ".join(_LOSSES)
        raise ConfigError(f"model.which_losses.0: {loss!r} is unknown; there is {known}")
    _, arguments = reader.named("model.which_model")
    if arguments.get("optimizers", None) is not None:
        adam = arguments.inside("optimizers.0")
    else:  # where the first published configs had it
        name, adam = reader.named("model.which_optimizers.0")
        if name != "Adam":
            raise ConfigError(f"model.which_optimizers.0: {name!r} is unknown; there is Adam")
    if adam.number("weight_decay", 0) != 0:
        raise ConfigError(
            f"{adam.full('weight_decay')}: must be 0; the published Adam adds it to the gradient, "
            "ours (AdamW) does not"
        )
    return {
        "loss": _LOSSES[loss],
        "lr": adam.number("lr"),
        "betas": adam.numbers("betas", [0.9, 0.999]),
        "weight_decay": 0.0,
        "warmup": 0,
        "clip": 0.0,
        "ema_decay": arguments.number("ema_scheduler.ema_decay", 0.9999, low=0),
    }
