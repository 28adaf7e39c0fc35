"""Compute and memory counted from shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from palette import config as configs
from palette import ops
from palette.build import build_network
from palette.training.cost import Cost, describe_cost, measure, meta_network

SMALL = (
    "model.channels=32",
    "model.channel_mults=[1,2]",
    "model.res_blocks=1",
    "model.attention_resolutions=[8]",
    "data.image_size=16",
)


def small(*overrides: str) -> configs.Config:
    return configs.from_sections({}, overrides=[*SMALL, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.kind=sr3", "model.dropout=0.1"),
        ("task.name=upscale",),
        ("task.name=generate", "model.num_classes=3"),
        ("data.image_size=[12,20]", "model.attention_resolutions=[6]"),
    ],
    ids=str,
)
def test_every_kind_of_network_is_counted(overrides):
    config = small(*overrides)
    cost = measure(config, torch.bfloat16)
    network = meta_network(config)
    assert cost.parameters == 4 * sum(value.numel() for value in network.parameters())
    assert cost.flops > 0
    assert cost.activations > 0
    assert cost.copies > 0


def test_one_convolution_and_one_attention_are_what_they_are():
    one = measure(small("model.channels=32", "model.attention_resolutions=[]"), torch.float32)
    wide = measure(small("model.attention_resolutions=[16]"), torch.float32)
    # Three layers more at 16x16 of 32 channels: qkv, scores and values, projection.
    tokens, channels = 256, 32
    layer = 2 * tokens * channels * 4 * channels + 4 * channels * tokens**2
    assert wide.flops - one.flops == 3 * layer


def test_the_count_does_not_depend_on_the_ops():
    found = measure(small(), torch.float32)
    with ops.use("reference"):
        plain = measure(small(), torch.float32)
    assert plain.flops == found.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_is_that_of_a_real_forward_pass(dtype):
    config = small("model.dropout=0.1")
    found = measure(config, dtype)
    network = build_network(config).train()
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    x, numbers = torch.zeros(3, 6, 16, 16), torch.arange(3)
    with (
        torch.autocast("cpu", dtype, enabled=dtype is not torch.float32),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        y = network(x, torch.full((3,), 0.5), None, numbers)
    assert y.requires_grad
    for value in network.parameters():
        kept.pop(value.untyped_storage().data_ptr(), None)
    real = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert 3 * found.activations + found.copies == real


def test_checkpointing_keeps_less():
    assert (
        measure(small("model.checkpoint=true"), torch.float32).activations
        < measure(small(), torch.float32).activations / 2
    )


def test_half_precision_keeps_less_of_each_image_and_copies_of_the_weights():
    config = small()
    full, half = (measure(config, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.activations < full.activations
    assert half.copies >= 0.4 * half.parameters


def test_the_text_has_steps_samples_and_averages():
    config = small("train.ema_decays=[0.9]", "data.batch_size=8", "train.accumulate=2")
    config = replace(config, train=replace(config.train, steps=1000))
    text = describe_cost(config, Cost(10**9, 2**20, 2**21, 0), torch.float32)
    assert "1 GFLOP an evaluation; about 24 GFLOP a step of 8, 24 TFLOP in 1,000 steps" in text
    assert "25 GFLOP a sample of 25 steps" in text
    assert "6 MiB a process for weights, gradients, Adam and 2 averages" in text
    assert "2 MiB of activations an image in float32, 8 MiB for 4 at once" in text
    sharded = replace(config, train=replace(config.train, parallel="fsdp"))
    text = describe_cost(sharded, Cost(10**9, 2**20, 2**21, 2**19), torch.bfloat16)
    assert "6 MiB over all processes and 512 KiB on each for weights, gradients, Adam" in text
