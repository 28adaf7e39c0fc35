"""GroupNorm+SiLU on every such layer of the published network: each backend beside PyTorch's ways.

    pytest benchmarks/bench_group_norm_silu.py

Each row is one shape [N, C, S, S]; ``count`` says how often the network has it, and the line of
sums counts it so often. The contestants run in turn in one process and the medians are compared:
eager PyTorch, what ``torch.compile`` fuses (channels-last), each backend, and "ours", the default.
Before each call x is written anew, as the convolution before it does.
"of copy" is the time of a plain copy of the tensor over ours: 1 is the speed of memory. An
implementation that is wrong in float64's eyes fails before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

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
GPU = torch.cuda.is_available()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = sorted(DTYPES) if GPU else list(DTYPES)  # of a GPU the half type says most
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
PIXELS = (256,) if GPU else (128, 256)
BATCHES = (1, 8) if GPU else (1,)
# On a GPU these alone go through torch.compile too, which takes seconds a shape.
COMPILED = [(64, 256), (256, 64), (512, 32)]


def _inputs(
    shape: tuple[int, ...], dtype: str, layout: str, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    channels = shape[1]
    x = torch.randn(shape).to(device, DTYPES[dtype], memory_format=LAYOUTS[layout])
    weight, bias = 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)
    return x, weight.to(x), bias.to(x)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def _check(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """At most four roundings of the result's dtype away from float64."""
    exact = _eager(x.double().contiguous(), weight.double(), bias.double())
    allowed = 4 * torch.finfo(x.dtype).eps * exact.abs().clamp(min=1)
    assert bool(((ours.double() - exact).abs() <= allowed).all()), "wrong: not worth a time"


def _compiled(inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    torch.compiler.reset()
    function = torch.compile(_eager, dynamic=False)
    return lambda: function(*inputs)


@pytest.mark.parametrize(("channels", "full", "count"), LAYERS)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NAMES)
def test_forward(
    benchmark,
    interleaved,
    row,
    forced,
    device,
    dtype,
    layout,
    batch,
    pixels,
    channels,
    full,
    count,
) -> None:
    side = full * pixels // 256
    inputs = _inputs((batch, channels, side, side), dtype, layout, device)
    x = inputs[0]
    target = torch.empty_like(x)

    def ours() -> Tensor:
        return ops.group_norm_silu(*inputs, GROUPS)

    contestants: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(x),
        "eager": lambda: _eager(*inputs),
    }
    with torch.inference_mode():
        _check(ours(), *inputs)
        few = batch == 1 and (channels, full) in COMPILED
        if layout == "channels-last" and (few or not GPU):
            contestants["compiled"] = _compiled(inputs)
        contestants |= forced("group_norm_silu", ours)
        written = x.clone()
        found = interleaved({**contestants, "ours": ours}, before=lambda: x.copy_(written))
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    table = f"group_norm_silu forward, batch {batch}, {pixels} pixels, {layout}, {dtype}"
    row(table, f"{channels}x{side}x{side}", count, found, 2 * x.nbytes / 1e6)


@pytest.mark.parametrize(("channels", "full", "count"), LAYERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", NAMES)
def test_backward(
    benchmark, interleaved, row, forced, device, dtype, batch, channels, full, count
) -> None:
    side = full // 2
    inputs = _inputs((batch, channels, side, side), dtype, "channels-last", device)
    for each in inputs:
        each.requires_grad_()
    grad = torch.randn_like(inputs[0])

    def ours() -> Tensor:
        return ops.group_norm_silu(*inputs, GROUPS)

    outputs = {name: call() for name, call in forced("group_norm_silu", ours).items()}
    outputs |= {"eager": _eager(*inputs), "ours": ours()}

    def through(y: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)

    contestants = {name: through(y) for name, y in outputs.items()}
    found = interleaved(contestants, seconds=0.06)
    benchmark.pedantic(contestants["ours"], rounds=5, warmup_rounds=1)
    table = f"group_norm_silu backward, batch {batch}, 128 pixels, channels-last, {dtype}"
    row(table, f"{channels}x{side}x{side}", count, found, 3 * grad.nbytes / 1e6)
