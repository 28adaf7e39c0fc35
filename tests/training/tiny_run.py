"""A training run of seconds: a real network, data and trainer, all as small as they go.

``python tiny_run.py RUN_DIR RESUME KEY=VALUE ...`` trains it in a process of its own, which a test
can kill; RESUME ``-`` starts anew. In the environment, FAULTS (``kill:1:6 nan:0:2``: what, to which
rank, in the step after which) happen in the first attempt only; SEEN is a folder where every
process writes a line for each batch: attempt, step, samples and the hash of its weights; TIMEOUT is
that of collectives, in seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from palette import config as configs
from palette.build import build_network, build_task
from palette.data.dataset import TaskDataset
from palette.data.photos import Photos
from palette.training.distributed import World, world
from palette.training.sharding import own_part
from palette.training.trainer import Trainer

OPTIONS = """
model: {channels: 32, channel_mults: [1, 1], res_blocks: 1, attention_resolutions: [8]}
task: {mask: center}
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
    task = build_task(config)
    return Trainer(
        config,
        network,
        Disturbed(training, task, size, config.run.seed, flip=True),
        Disturbed(held_out, task, size, config.run.seed, shuffle=False),
        processes or World(0, 1, torch.device("cpu")),
    )


def observe(trainer: Trainer) -> None:
    """Write down what this process sees, and let happen to it what FAULTS says."""
    rank, attempt = trainer.world.rank, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    seen = Path(os.environ["SEEN"], f"{rank}.jsonl")
    faults = [fault.split(":") for fault in os.environ.get("FAULTS", "").split()]
    now = {int(step): what for what, who, step in faults if int(who) == rank and not attempt}

    def disturb(keys: Any, entries: Any) -> None:
        parts = [own_part(value.detach()) for value in trainer.trained.values()]
        values = b"".join(part.numpy().tobytes() for part in parts)
        line = [attempt, trainer.step, keys, hashlib.sha256(values).hexdigest()]
        with seen.open("a") as file:
            file.write(json.dumps(line) + "\n")
        what = now.get(trainer.step)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "hang":
            time.sleep(1000)
        elif what == "nan":
            entries[0]["target"] = torch.full_like(entries[0]["target"], float("nan"))

    trainer.dataset.disturb = disturb


if __name__ == "__main__":
    with world("cpu", float(os.environ.get("TIMEOUT", "1800"))) as here:
        run = build(Path(sys.argv[1]), sys.argv[3:], here)
        if "SEEN" in os.environ:
            observe(run)
        run.fit(None if sys.argv[2] == "-" else sys.argv[2])
