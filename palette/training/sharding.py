"""Networks that do not fit one device: FSDP2 keeps 1/P of each tensor on each of P processes.

The parts of the network (``units``) are gathered one at a time for their forward and backward pass.
A sharded tensor is a DTensor; what is written to disk, and what is sampled from, is gathered whole,
so that neither knows how the network was trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from palette.config import Config
from palette.models.layers import channels_last
from palette.training.cost import meta_network


def shard(network: nn.Module, device: torch.device, processes: int) -> None:
    """Shard the parameters in place, and move this process's share to the device.

    Each of ``network.units()`` is gathered alone, the rest of the network for its whole forward
    pass. Computing in a half type stays with autocast, so that numbers are those of one process.
    """
    # The network crops a view of its last convolution, and no loss writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes,))
    for parameter in network.parameters():  # FSDP2 knows no channels-last
        parameter.data = parameter.data.contiguous()
    units: list[list[nn.Module]] = getattr(network, "units", list)()
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


@contextmanager
def local_gradients(model: FSDPModule) -> Iterator[None]:
    """Within the block backward passes send nothing: gradients add up on each process."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def clip_(network: nn.Module, limit: float) -> Tensor:
    """Scale all gradients in place to a norm of at most ``limit``, 0 for any; the norm before."""
    return gathered(nn.utils.clip_grad_norm_(network.parameters(), limit or float("inf")))


def own_part(value: Tensor) -> Tensor:
    """What this process keeps of a tensor, in the same memory; all of one that is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def gathered(value: Tensor) -> Tensor:
    """A whole tensor on every process; all of them must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered_states(states: Any, *, keep: bool) -> Any:
    """Nested state dicts with whole tensors on the CPU in place of sharded ones.

    All processes take part, one tensor after another; those that do not ``keep`` get None.
    """
    if isinstance(states, dict):
        return {key: gathered_states(value, keep=keep) for key, value in states.items()}
    if isinstance(states, list):
        return [gathered_states(value, keep=keep) for value in states]
    if isinstance(states, DTensor):
        whole = gathered(states)
        return whole.cpu() if keep else None
    return states


def load_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``network.load_state_dict(state)`` of whole tensors, whether or not it is sharded."""
    own = network.state_dict()
    network.load_state_dict({name: _part_of(value, own.get(name)) for name, value in state.items()})


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Moments and step numbers of ``state``, in whole tensors, whether or not it is sharded.

    Learning rate, decays and the like stay those that the optimizer was made with.

    Args:
        optimizer: over ``parameters``, in their order.
        state: as ``optimizer.state_dict()`` of one process.
        parameters: by name.
    """
    own = dict(enumerate(parameters.values()))
    slots = {
        number: {name: _moment(value, own[number]) for name, value in slot.items()}
        for number, slot in state["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _moment(value: Any, parameter: nn.Parameter) -> Any:
    """A moment in the layout of its parameter: the fused kernels walk through both as they lie in
    memory, and do not ask whether both are channels-last."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        return _part_of(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _part_of(value: Tensor, own: Tensor | None) -> Tensor:
    """Of a whole tensor, the same on every process, a sharded one like ``own``."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value  # shapes that differ are named by load_state_dict
    value = value.to(own.device).contiguous()
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def whole(network: nn.Module, config: Config) -> nn.Module:
    """The network, to be evaluated by one process alone: a copy with all weights where sharded.

    All processes must call, and keep the copy no longer than it is needed.
    """
    if not isinstance(network, FSDPModule):
        return network
    copy = meta_network(config)
    state = {name: gathered(value) for name, value in network.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    channels_last(copy)
    return copy.eval().requires_grad_(False)
