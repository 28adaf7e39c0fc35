"""A training run of seconds: a real network, data and trainer, all as small as they go.

``python tiny_run.py RUN_DIR RESUME KEY=VALUE ...`` trains it in a process of its own, which a test
can kill; RESUME ``-`` starts anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from palette import config as configs
from palette.build import build_network
from palette.data.dataset import TaskDataset
from palette.data.photos import Photos
from palette.data.tasks import make_task
from palette.training.distributed import World, world
from palette.training.trainer import Trainer

OPTIONS = """
model: {channels: 32, channel_mults: [1, 1], res_blocks: 1, attention_resolutions: [8]}
data: {image_size: 16, batch_size: 4, validation: 6}
train: {precision: float32, steps: 12, lr: 1e-3, warmup: 3, save_every: 4, log_every: 1}
sample: {steps: 2, count: 3}
"""


class Disturbed(TaskDataset):
    """A dataset that calls ``disturb(keys, entries)`` on the samples of each batch."""

    disturb: Callable[[Any, Any], object] = staticmethod(lambda keys, entries: None)

    def __getitems__(self, keys: Any) -> Any:
        entries = super().__getitems__(keys)
        self.disturb(keys, entries)
        return entries


def build(run_dir: Path, overrides: Sequence[str] = (), processes: World | None = None) -> Trainer:
    torch.set_num_threads(1)
    sets = [f"run.dir={run_dir}", "model.dropout=0.1", "train.sample_every=6", *overrides]
    config = configs.from_yaml(OPTIONS, overrides=sets)
    torch.manual_seed(config.run.seed)
    network = build_network(config)
    size = (16, 16)
    training = Photos("train", image_size=size, samples=30)
    held_out = Photos("validation", image_size=size, samples=6)
    task = make_task("inpaint", mask="center")
    return Trainer(
        config,
        network,
        Disturbed(training, task, size, config.run.seed, flip=True),
        Disturbed(held_out, task, size, config.run.seed, shuffle=False),
        processes or World(0, 1, torch.device("cpu")),
    )


if __name__ == "__main__":
    with world("cpu") as here:
        resume = None if sys.argv[2] == "-" else sys.argv[2]
        build(Path(sys.argv[1]), sys.argv[3:], here).fit(resume)
