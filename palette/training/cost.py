"""What a training costs, from shapes alone: nothing is allocated and no number is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from palette.build import CHANNELS, build_network, condition_channels, image_size, tells_level
from palette.config import Config


@dataclass(frozen=True)
class Cost:
    """What one network costs, counted with the ops of this machine's processor.

    Attributes:
        flops: of one evaluation for one image; a multiplication and an addition are two.
        parameters: bytes of the weights in float32.
        activations: bytes kept for the backward pass, for each image; with ``model.checkpoint``
            the inputs of the blocks, which are computed again one at a time.
        copies: bytes kept for it once, however many images: weights in half precision.
    """

    flops: int
    parameters: int
    activations: int
    copies: int


def meta_network(config: Config) -> nn.Module:
    """The network of a config on the meta device: every shape and no memory."""
    with torch.device("meta"):
        return build_network(config)


def measure(config: Config, dtype: torch.dtype, network: nn.Module | None = None) -> Cost:
    """Cost of the network of a config, computing in ``dtype``.

    ``network``: as :func:`meta_network` makes it, where there is one already.
    """
    network = meta_network(config) if network is None else network
    # Fake tensors, unlike meta ones, have a device, by which ops and autocast choose.
    with FakeTensorMode():
        weights = {name: _like(value) for name, value in network.named_parameters()}
        arguments = _arguments(config, images=1)
        flops = count_flops(lambda: torch.func.functional_call(network, weights, arguments))
        one, two = (_kept(network, weights, _arguments(config, images), dtype) for images in (1, 2))
    return Cost(
        flops=flops,
        parameters=sum(4 * value.numel() for value in weights.values()),
        activations=two - one,
        copies=2 * one - two,
    )


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of all that ``call`` computes, without gradients; a product and its sum are two."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.palette.attention: _attention}
    )
    with torch.no_grad(), counter:
        call()
    return counter.get_total_flops()


def _kept(
    network: nn.Module,
    weights: dict[str, Tensor],
    arguments: tuple[Tensor | None, ...],
    dtype: torch.dtype,
) -> int:
    """Bytes that one forward pass keeps for its backward pass, beside the weights themselves."""
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage()._cdata] = value
        return value

    def keep_input(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        keep(given[0])

    blocks = [block for block in network.modules() if getattr(block, "checkpoint", False)]
    hooks = [block.register_forward_pre_hook(keep_input) for block in blocks]
    with (
        torch.autocast("cpu", dtype, enabled=dtype is not torch.float32),
        saved_tensors_hooks(keep, lambda value: value),
    ):
        torch.func.functional_call(network, weights, arguments)
    for hook in hooks:
        hook.remove()
    own = {value.untyped_storage()._cdata for value in weights.values()}
    return sum(value.untyped_storage().nbytes() for at, value in kept.items() if at not in own)


def describe_cost(config: Config, cost: Cost, dtype: torch.dtype) -> str:
    """The cost of training and sampling, in two lines."""
    train, batch = config.train, config.data.batch_size
    averages = 1 + len(train.ema_decays) + (train.swa_start is not None)
    states = 4 + averages  # weights, gradients, two moments of Adam
    at_once = batch // train.accumulate
    step = 3 * cost.flops * batch  # the backward pass: one for the inputs, one for the weights
    name = str(dtype).removeprefix("torch.")
    kept, copies = states * cost.parameters, cost.copies
    held = f"{_bytes(kept + copies)} a process"
    if train.parallel == "fsdp":
        held = f"{_bytes(kept)} over all processes and {_bytes(copies)} on each"
    return "\n".join(
        (
            f"compute: {_flops(cost.flops)} an evaluation; about {_flops(step)} a step of {batch}, "
            f"{_flops(step * train.steps)} in {train.steps:,} steps; "
            f"{_flops(cost.flops * config.sample.steps)} a sample of {config.sample.steps} steps",
            f"memory: {held} for weights, gradients, Adam and {averages} "
            f"average{'s' * (averages > 1)}; "
            f"{_bytes(cost.activations)} of activations an image in {name}, "
            f"{_bytes(cost.activations * at_once)} for {at_once} at once over all processes",
        )
    )


def _arguments(config: Config, images: int) -> tuple[Tensor | None, ...]:
    """Arguments of one training evaluation; see ``UNet.forward``."""
    height, width = image_size(config)
    x = torch.empty(images, condition_channels(config) + CHANNELS, height, width)
    numbers = torch.empty(images, dtype=torch.int64)
    label = None if config.model.num_classes is None else numbers
    level = [torch.empty(images)] if tells_level(config) else []
    return (x, torch.empty(images), label, numbers, *level)


def _like(value: Tensor) -> Tensor:
    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return fake.requires_grad_(value.requires_grad)


def _attention(
    qkv: Sequence[int], heads: int, order: str, *, out_shape: Any = None, **_: Any
) -> int:
    """Of the op ``palette::attention`` on a shape [N, 3C, ...]: scores, and their mean of values.

    Arguments beside the first are those by which the counter calls.
    """
    pixels = math.prod(qkv[2:])
    return 4 * qkv[0] * (qkv[1] // 3) * pixels * pixels


def _flops(count: float) -> str:
    return f"{_scaled(count, 1000)}FLOP"


def _bytes(count: float) -> str:
    return f"{_scaled(count, 1024, 'i')}B"


def _scaled(count: float, base: int, mark: str = "") -> str:
    """Three figures, a space and the unit's prefix, such as "2.24 T" or "11.3 Gi"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if count < base or prefix == "Z":
            break
        count /= base
    figures = f"{count:.3g}" if count < 1000 else f"{count:.0f}"
    return f"{figures} {prefix.upper() if mark else prefix}{mark if prefix else ''}"
