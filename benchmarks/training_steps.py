"""The training steps that ``bench_training.py`` compares, each on the same batch of pictures.

``python training_steps.py NAME SIDE BATCH`` runs three of them in a process of its own and prints
how much it grew, from before the first step to its largest, in bytes.
"""

from __future__ import annotations

import copy
import functools
import gc
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from bench_sampling import plain_network, published_network
from torch import Tensor, nn

from palette import config as configs
from palette import ops
from palette.build import build_schedule, build_task
from palette.data.dataset import Batch, TaskDataset, collate
from palette.data.photos import Photos
from palette.diffusion import objective
from palette.models.layers import PointwiseConv
from palette.training.allocator import keep_freed_memory
from palette.training.distributed import World
from palette.training.interrupts import Interrupts
from palette.training.logging import RunLog
from palette.training.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EMA_DECAY = 0.9999
LR = 5e-5


class Step(Protocol):
    """One training step; and the float32 weights that it trains."""

    def __call__(self) -> object: ...
    def parameters(self) -> list[Tensor]: ...


def config_of(side: int, batch: int) -> configs.Config:
    """The published training, with the precision that this machine is fast at."""
    overrides = [f"data.image_size={side}", f"data.batch_size={batch}", f"train.lr={LR}"]
    overrides += ["train.steps=1000000", "train.log_every=1000000", "data.validation=0"]
    return configs.from_yaml("task: {mask: center}", overrides=overrides)


def dataset_of(config: configs.Config) -> TaskDataset:
    """Crops of the photographs that every install has."""
    side = config.data.image_size
    size = (side, side)
    return TaskDataset(Photos(image_size=size), build_task(config), size, config.run.seed)


def batch_of(config: configs.Config) -> Batch:
    """The first samples of it."""
    return collate(dataset_of(config).__getitems__([(0, k) for k in range(config.data.batch_size)]))


class Ours:
    """What ``palette train`` does: forward, backward, clipping, AdamW, average."""

    def __init__(self, config: configs.Config) -> None:
        keep_freed_memory()
        self._batch = batch_of(config)
        config.run.dir = tempfile.mkdtemp()
        world = World(0, 1, DEVICE)
        self.trainer = Trainer(config, published_network(), dataset_of(config), None, world)
        self._log = RunLog(Path(config.run.dir), 0, 1, active=False)
        self._interrupts = Interrupts()

    def __call__(self, batch: Batch | None = None) -> None:
        self.trainer._train_step(batch or self._batch, self._log, self._interrupts)

    def parameters(self) -> list[Tensor]:
        return list(self.trainer.network.parameters())

    @property
    def copies(self) -> int:
        """Bytes of the weights' copies, which are there before the first step."""
        mixed = self.trainer.mixed
        enlarging = [(layer._weight, layer._bias) for layer in mixed._enlarging]
        return sum(each.nbytes for each in (*mixed.copies().values(), *sum(enlarging, ())))


class Eager:
    """As published: float32, forward, backward, Adam, the average one parameter at a time."""

    def __init__(self, config: configs.Config) -> None:
        self.network = plain_network().train().to(DEVICE)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        found = batch_of(config)
        self._tensors = {name: v.to(DEVICE) for name, v in found.items() if isinstance(v, Tensor)}
        self._schedule = build_schedule(config)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=LR)

    def parameters(self) -> list[Tensor]:
        return list(self.network.parameters())

    def backward(self, model: nn.Module) -> None:
        """Gradients of the published loss: the mean over all pixels, random numbers by torch."""
        target = self._tensors["target"]
        objective.loss(
            lambda x, gamma, label, seeds: model(x, gamma, label),
            self._schedule,
            self._tensors,
            None,
            normalise=False,
            noise=torch.randn_like(target),
            gamma=torch.rand(len(target), device=DEVICE) * 0.9 + 0.05,
        ).total.backward()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with ops.use("reference"):
            self.backward(self.network)
        self.optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.parameters(), strict=True):
                mean.copy_(mean * EMA_DECAY + (1 - EMA_DECAY) * weight)


class BFloat16(Eager):
    """By the book: bfloat16 autocast, channels-last, clipping, fused AdamW, the average at once."""

    def __init__(self, config: configs.Config, *, compiled: bool = False) -> None:
        super().__init__(config)
        for network in (self.network, self.average):
            network.to(memory_format=torch.channels_last)
        weights = self.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)
        self._model = torch.compile(self.network) if compiled else self.network

    def __call__(self) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16), ops.use("sdpa"):
            self.backward(self._model)
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            means = list(self.average.parameters())
            torch._foreach_lerp_(means, self.parameters(), 1 - EMA_DECAY)


def floor(config: configs.Config) -> Callable[[], object]:
    """The network's convolutions alone, forward and backward, by PyTorch in bfloat16."""
    network = published_network().to(DEVICE, torch.bfloat16)
    calls: list[tuple[nn.Module, Tensor]] = []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, PointwiseConv)):
            layer.register_forward_hook(lambda layer, x, _: calls.append((layer, x[0].detach())))
    side, batch = config.data.image_size, config.data.batch_size
    x = torch.randn(batch, 6, side, side, dtype=torch.bfloat16, device=DEVICE)
    network(x, torch.full((batch,), 0.5, device=DEVICE))
    for number, (layer, x) in enumerate(calls):
        layer._forward_hooks.clear()
        x.requires_grad_(number > 0)  # nobody asks for the gradient of the picture
    gradients = [torch.randn_like(layer(x)) for layer, x in calls]

    def run() -> None:
        for (layer, x), gradient in zip(calls, gradients, strict=True):
            wanted = [*layer.parameters(), *([x] if x.requires_grad else [])]
            torch.autograd.grad(layer(x), wanted, gradient)

    return run


CONTESTANTS: dict[str, Callable[[configs.Config], Callable[[], object]]] = {
    "eager": Eager,
    "bf16": BFloat16,
    "compiled": functools.partial(BFloat16, compiled=True),
    "ours": Ours,
    "floor": floor,
}


def growth(run: Callable[[], object]) -> int:
    """Bytes by which this process grows at most in three steps; on a GPU the allocator's peak."""
    if DEVICE.type == "cuda":
        for _ in range(3):
            run()
        return torch.cuda.max_memory_allocated()
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # forgets what was needed to get here
    for _ in range(3):
        run()
    status = Path("/proc/self/status").read_text().splitlines()
    highest = next(line for line in status if line.startswith("VmHWM:"))
    return int(highest.split()[1]) * 1024 - before + getattr(run, "copies", 0)


if __name__ == "__main__":
    print(growth(CONTESTANTS[sys.argv[1]](config_of(int(sys.argv[2]), int(sys.argv[3])))))
