"""One process or many: who am I, on which device, and the few collectives that training needs.

``torchrun`` starts the processes and sets the environment that is read here; without it the world
is one process and every collective is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from palette.build import resolve_device, resolve_precision
from palette.config import Config, ConfigError
from palette.data.dataset import Batch
from palette.training.sharding import local_gradients, shard

TIMEOUT = 1800.0  # seconds; PyTorch's own for gloo


@dataclass(frozen=True)
class World:
    """The place of this process among all."""

    rank: int
    size: int
    device: torch.device
    store: Store | None = None  # of this attempt; None where there is one process

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The value that the first process has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_does(self, action: Callable[[], object]) -> None:
        """Run ``action`` on the first process; all wait for it, and raise what it raises."""
        problem: Exception | None = None
        if self.is_first:
            try:
                action()
            except Exception as error:
                problem = error
        problem = self.from_first(problem)
        if problem is not None:
            raise problem

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str = "auto", timeout: float = TIMEOUT) -> Iterator[World]:
    """The processes of this run, connected for the duration of the block.

    Args:
        device: as in ``run.device``.
        timeout: seconds that a collective waits for the other processes.

    Raises:
        RuntimeError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, resolve_device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    # After a restart torchrun hands out the store of the first attempt, which still holds the
    # addresses of dead processes (pytorch #135712); a prefix per attempt keeps them apart.
    first, _, _ = next(iter(rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt_{attempt}", first)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield World(rank, size, chosen, store)
    finally:
        dist.destroy_process_group()


def is_sharded(config: Config, world: World) -> bool:
    """Whether each process keeps only a part of every tensor."""
    return config.train.parallel == "fsdp" and world.size > 1


def share_out(networks: Sequence[nn.Module], world: World) -> None:
    """Shard networks in place over all processes, each onto its device."""
    for network in networks:
        shard(network, world.device, world.size)


def parallel(network: nn.Module, world: World) -> nn.Module:
    """The network, its gradients averaged over all processes where there are several."""
    if world.size == 1 or isinstance(network, FSDPModule):
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices)


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients local: only the last backward pass of a step is worth a message."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if isinstance(model, FSDPModule):
        return local_gradients(model)
    return nullcontext()


def precision(config: Config, world: World) -> torch.dtype:
    """What the network computes in here. Raises ConfigError for float16 on a CPU or sharded."""
    dtype = resolve_precision(config.train.precision, world.device)
    if dtype is torch.float16 and world.device.type == "cpu":
        raise ConfigError("train.precision=float16 needs a GPU; on a CPU use auto or bfloat16")
    if dtype is torch.float16 and is_sharded(config, world):
        raise ConfigError(
            "train.parallel=fsdp goes with train.precision=bfloat16 or float32; got float16, whose "
            "scale would not be the same on all processes"
        )
    return dtype


def copies_in(config: Config, world: World) -> torch.dtype:
    """The dtype of copies of the weights that last a step; float32: none.

    Sharding gathers weights anew for each use, and compiled code rounds them on the way.
    """
    if is_sharded(config, world) or config.train.compile:
        return torch.float32
    return precision(config, world)


def check_share(config: Config, world: World) -> None:
    """Raise ConfigError unless every process gets the same share of a batch."""
    parts = world.size * config.train.accumulate
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} must be a multiple of {parts}, "
            f"train.accumulate times {world.size} processes"
        )


def split(batch: Batch, parts: int, device: torch.device) -> list[dict[str, Tensor]]:
    """The tensors of a batch in equal parts on the device, images channels-last."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
            is_image = value.dim() == 4
            moved[name] = value.to(memory_format=torch.channels_last) if is_image else value
    size = len(batch["target"]) // parts
    return [
        {name: value[index * size : (index + 1) * size] for name, value in moved.items()}
        for index in range(parts)
    ]
