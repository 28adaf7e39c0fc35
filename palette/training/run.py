"""One training run, from its config to the pictures at the end."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from palette import config as configs
from palette import ops
from palette.build import (
    build_datasets,
    build_network,
    image_size,
    resolve_device,
    resolve_precision,
    trained_tasks,
)
from palette.config import Config
from palette.convert import convert
from palette.data.dataset import collate
from palette.models.initial import initialise
from palette.pipeline import load
from palette.training.allocator import keep_freed_memory
from palette.training.cost import describe_cost, measure, meta_network
from palette.training.distributed import World, world
from palette.training.summary import write_summary
from palette.training.trainer import Trainer


def train(config: Config, resume: str | None = None, *, export: Path | None = None) -> None:
    """Train as ``config`` says, then write the summary where ``summary.crops`` asks for one.

    Args:
        config: the whole config.
        resume: as for ``Trainer.fit``.
        export: where the averaged weights go in the end, as one ``.safetensors`` file.

    Raises:
        ConfigError, CheckpointError, ValueError: what a user can cause, in one line each.
        SystemExit: 143 or 130 after SIGTERM or Ctrl-C, with everything saved.
    """
    keep_freed_memory()
    with world(timeout=config.train.timeout) as processes:
        dataset, validation = build_datasets(config)
        torch.manual_seed(config.run.seed)
        network = build_network(config)
        if config.model.init != "default":
            initialise(network, config.model.init, config.model.init_gain)
        if processes.is_first:
            print(describe(config, network))
        Trainer(config, network, dataset, validation, processes).fit(resume)
        if processes.is_first and config.summary.crops > 0:
            _summarise(config, processes)
        if processes.is_first and export is not None:
            print("\n".join(convert(Path(config.run.dir), export)))


def describe(config: Config, network: torch.nn.Module) -> str:
    """What would be trained, on what, and by which ops, in a few lines."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    device = resolve_device()
    dtype = str(resolve_precision(config.train.precision, device)).removeprefix("torch.")
    backends = ", ".join(f"{op} {ops.choose(op, device.type)}" for op in ops.names())
    tasks = " + ".join(trained_tasks(config))
    attention = "; ".join(getattr(network, "attention_layers", [])) or "none"
    return "\n".join(
        (
            f"network: {config.model.kind}, {parameters:,} parameters; attention: {attention}",
            f"task: {tasks} at {'x'.join(map(str, image_size(config)))}",
            f"ops on {device}, {dtype}: {backends}",
        )
    )


def _summarise(config: Config, processes: World) -> None:
    directory = Path(config.run.dir)
    model = load(directory, device=processes.device)
    task = replace(config.task, name="inpaint", mask="center")
    _, dataset = build_datasets(replace(config, task=task))
    if dataset is None:
        return
    crops = min(config.summary.crops, len(dataset))
    entries = dataset.__getitems__([(0, index) for index in range(crops)])
    print(f"\nSampling {crops} crops, {config.summary.samples} times each …\n")
    print(write_summary(directory, model, collate(entries), config.summary.samples))
    where = shlex.quote(config.run.dir)
    print(f"Pictures and tables: {where}. Now your own, from the command line and from Python:\n")
    print(f"    python -m palette sample {where} --input photo.jpg --mask mask.png --output out")
    print(f'    palette.load("{config.run.dir}").inpaint("photo.jpg", "mask.png", seed=0)')
    sys.stdout.flush()


def dry_run(config: Config) -> str:
    """The resolved config, what it would train, and what that costs; nothing large is allocated."""
    network = meta_network(config)
    dtype = resolve_precision(config.train.precision, resolve_device())
    cost = describe_cost(config, measure(config, dtype, network), dtype)
    return f"{configs.to_yaml(config)}\n{describe(config, network)}\n{cost}"
