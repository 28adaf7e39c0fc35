"""From a config to the objects it describes: network, schedule, data, device, precision."""

from __future__ import annotations

import torch
from torch import nn

from palette.config import Config, ConfigError
from palette.data.dataset import TaskDataset
from palette.data.sources import class_names
from palette.data.split import open_split
from palette.data.tasks import Task, make_task, takes
from palette.diffusion.schedule import Array, Schedule, published, spaced
from palette.models.sr3 import SR3UNet
from palette.models.unet import UNet

CHANNELS = 3  # of condition and target each: grey pictures are repeated, so tasks can be mixed
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_network(config: Config) -> nn.Module:
    """The network that ``config.model`` describes, freshly initialised, on the CPU in float32."""
    model = config.model
    if model.kind == "sr3":
        return SR3UNet(
            image_size=image_size(config),
            in_channels=condition_channels(config) + CHANNELS,
            out_channels=CHANNELS,
            channels=model.channels,
            channel_mults=model.channel_mults,
            res_blocks=model.res_blocks,
            attention_resolutions=model.attention_resolutions,
            dropout=model.dropout,
            norm_groups=model.norm_groups,
            noise_level_embedding=model.noise_level_embedding,
            embedding=model.embedding,
        )
    return UNet(
        image_size=image_size(config),
        in_channels=condition_channels(config) + CHANNELS,
        out_channels=CHANNELS,
        channels=model.channels,
        channel_mults=model.channel_mults,
        res_blocks=model.res_blocks,
        attention_resolutions=model.attention_resolutions,
        attention=model.attention,
        dropout=model.dropout,
        embedding_dropout=model.embedding_dropout,
        heads=model.heads,
        head_channels=model.head_channels,
        heads_upsample=model.heads_upsample,
        attention_order=model.attention_order,
        scale_shift=model.scale_shift,
        resblock_updown=model.resblock_updown,
        conv_resample=model.conv_resample,
        checkpoint=model.checkpoint,
        embedding=model.embedding,
        num_classes=model.num_classes,
        condition_level=tells_level(config),
    )


def build_schedule(config: Config) -> Schedule:
    """The noise schedule that ``config.schedule`` describes."""
    chosen = config.schedule
    return Schedule.from_name(
        chosen.name, chosen.steps, chosen.start, chosen.end, chosen.cosine_offset
    )


def default_eta(config: Config, solver: str) -> float:
    """``sample.eta`` for the solver that has one, 0 for every other that may be asked for."""
    return config.sample.eta if solver == "ddim" else 0.0


def build_task(config: Config) -> Task:
    """The task that ``config.task`` describes. Raises ValueError where its mask cannot be read."""
    chosen = config.task
    return make_task(
        chosen.name,
        mask=chosen.mask,
        quality=chosen.quality,
        factor=chosen.factor,
        augmentation=chosen.augmentation,
        tasks=chosen.tasks,
        weights=chosen.weights or [1.0] * len(chosen.tasks),
    )


def trained_tasks(config: Config) -> list[str]:
    """Names of what a model of this config can do."""
    return config.task.tasks if config.task.name == "mixture" else [config.task.name]


def condition_channels(config: Config) -> int:
    """Channels of the condition."""
    return 0 if config.task.name == "generate" else CHANNELS


def tells_level(config: Config) -> bool:
    """Whether the network is told how noisy its condition is."""
    return "upscale" in trained_tasks(config) and config.task.augmentation > 0


def build_datasets(config: Config, *, split: bool = True) -> tuple[TaskDataset, TaskDataset | None]:
    """The training samples, and the fixed samples held out of training where there are any.

    ``split`` False holds none out.

    Raises:
        ConfigError, ValueError: there are no pictures, or not those that the task needs.
    """
    data, size = config.data, image_size(config)
    task = build_task(config)
    if data.source == "pairs" and not takes(task, "condition"):
        raise ConfigError(
            f"data.source=pairs: task.name={config.task.name} takes no condition; "
            "use colorize or paired"
        )
    _check_classes(config)
    training, held_out = open_split(
        data.source,
        data.path,
        image_size=size,
        detail=8 if data.fit == "zoom" else 2,  # so that crops stay sharp
        samples=data.samples_per_epoch,
        validation=data.validation if split else 0,
        pictures=data.validation_pictures,
        limit=data.limit,
        conditions=data.conditions,
        names=data.names,
        classes=config.model.num_classes if data.source == "shards" else None,
    )
    seed, fit = config.run.seed, data.fit
    dataset = TaskDataset(
        training,
        task,
        size,
        seed,
        fit=fit,
        flip=data.flip,
        shuffle=data.shuffle,
        fresh=config.task.fresh,
    )
    if held_out is None:
        return dataset, None
    return dataset, TaskDataset(held_out, task, size, seed, fit=fit, shuffle=False)


def _check_classes(config: Config) -> None:
    """Labels and the network's classes go together."""
    data, classes = config.data, config.model.num_classes
    if data.source == "classes" and len(class_names(data.path)) != classes:
        found = len(class_names(data.path))
        raise ConfigError(
            f"{data.path}: has {found} classes, but model.num_classes is {classes}; "
            f"set it to {found}, or data.source=folder for none"
        )
    if classes is not None and data.source in ("photos", "folder", "list", "pairs"):
        raise ConfigError(
            f"model.num_classes={classes} needs labels, such as data.source=classes; "
            f"data.source={data.source} has none"
        )


def epoch_length(pictures: int, config: Config) -> int:
    """Samples of an epoch: all, or with ``data.drop_last`` those that fill whole batches.

    Raises:
        ConfigError: there is not one whole batch.
    """
    size = config.data.batch_size
    length = pictures - pictures % size if config.data.drop_last else pictures
    if length < 1:
        raise ConfigError(
            f"data.drop_last leaves no batch of data.batch_size={size} from {pictures} pictures"
        )
    return length


def image_size(config: Config) -> tuple[int, int]:
    """Height and width that the network is trained at."""
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` is the first CUDA device where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype the network runs in: ``auto`` is a half type where the hardware is fast at it."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def build_levels(config: Config, steps: int | None = None) -> Array:
    """The noise levels that sampling walks, float64 [S + 1].

    ``steps`` None is the number and the grid of the config. Another number of steps is spaced in
    log-SNR within the trained range: more than half of the published grid lies below it.
    """
    sample = config.sample
    if sample.grid == "published" and steps in (None, sample.steps):
        name = config.schedule.name
        return published(Schedule.from_name(name, sample.steps, sample.start, sample.end))
    return spaced(build_schedule(config), sample.steps if steps is None else steps)
