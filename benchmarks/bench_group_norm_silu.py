"""GroupNorm+SiLU on every such layer of the published network: reference, eager PyTorch, ours.

    pytest benchmarks/bench_group_norm_silu.py

Each row is one shape [1, C, S, S]; ``count`` says how often the network has it, and the line of
sums counts it so often. The contestants run in turn in one process and the medians are compared.
"of copy" is the time of a plain copy of the tensor over ours: 1 is the speed of memory. An
implementation that is wrong in float64's eyes fails before it is timed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from palette import ops

GROUPS = 32
# (channels, side at 256 pixels, count): the published 62.6 M network, reference/layer_shapes
LAYERS = [
    *((64, 256, 9), (128, 256, 3), (192, 256, 1)),
    *((64, 128, 2), (128, 128, 8), (192, 128, 1), (256, 128, 2), (384, 128, 1)),
    *((128, 64, 2), (256, 64, 8), (384, 64, 1), (512, 64, 2), (768, 64, 1)),
    *((256, 32, 2), (512, 32, 11), (768, 32, 1), (1024, 32, 2)),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
PIXELS = (128, 256)


def _inputs(channels: int, side: int, dtype: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(channels + side)
    x = torch.randn(1, channels, side, side).to(DTYPES[dtype], memory_format=LAYOUTS[layout])
    weight, bias = 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)
    return x, weight.to(x.dtype), bias.to(x.dtype)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def _check(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """At most four roundings of the result's dtype away from float64."""
    exact = _eager(x.double().contiguous(), weight.double(), bias.double())
    allowed = 4 * torch.finfo(x.dtype).eps * exact.abs().clamp(min=1)
    assert bool(((ours.double() - exact).abs() <= allowed).all()), "wrong: not worth a time"


@pytest.mark.parametrize(("channels", "full", "count"), LAYERS)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(benchmark, interleaved, row, dtype, layout, pixels, channels, full, count) -> None:
    side = full * pixels // 256
    x, weight, bias = _inputs(channels, side, dtype, layout)
    target = torch.empty_like(x)

    def ours() -> Tensor:
        return ops.group_norm_silu(x, weight, bias, GROUPS)

    def reference() -> Tensor:
        with ops.use("reference"):
            return ops.group_norm_silu(x, weight, bias, GROUPS)

    with torch.inference_mode():
        _check(ours(), x, weight, bias)
        found = interleaved(
            {
                "copy": lambda: target.copy_(x),
                "reference": reference,
                "eager": lambda: _eager(x, weight, bias),
                "ours": ours,
            }
        )
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    table = f"group_norm_silu forward, {pixels} pixels, {layout}, {dtype}"
    row(table, f"{channels}x{side}x{side}", count, found)


@pytest.mark.parametrize(("channels", "full", "count"), LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(benchmark, interleaved, row, dtype, channels, full, count) -> None:
    side = full // 2
    inputs = tuple(t.requires_grad_() for t in _inputs(channels, side, dtype, "channels-last"))
    grad = torch.randn_like(inputs[0])
    outputs = {"eager": _eager(*inputs), "ours": ops.group_norm_silu(*inputs, GROUPS)}

    def through(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[name], inputs, grad, retain_graph=True)

    found = interleaved(
        {"eager": lambda: through("eager"), "ours": lambda: through("ours")}, seconds=0.06
    )
    benchmark.pedantic(lambda: through("ours"), rounds=5, warmup_rounds=1)
    table = f"group_norm_silu backward, 128 pixels, channels-last, {dtype}"
    row(table, f"{channels}x{side}x{side}", count, found)
