"""Seeded dropout beside PyTorch's own, forward and backward, on feature maps of a training step.

    pytest benchmarks/bench_dropout.py

"eager" is ``F.dropout``, which has one generator for the whole batch and keeps its mask for the
backward pass; "of copy" is the time of a plain copy over ours.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from palette import ops

# [N, C, H, W] of dropout layers
SHAPES = [(8, 64, 64, 64), (8, 128, 32, 32), (8, 256, 16, 16)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
P = 0.2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(benchmark, interleaved, row, forced, device, dtype, layout, shape) -> None:
    x = torch.randn(shape).to(device, DTYPES[dtype], memory_format=LAYOUTS[layout])
    seeds, target = torch.arange(shape[0], device=device), torch.empty_like(x)

    def ours() -> Tensor:
        return ops.dropout(x, seeds, P, 3)

    with torch.inference_mode():
        contestants = {
            "copy": lambda: target.copy_(x),
            "eager": lambda: F.dropout(x, P),
            **forced("dropout", ours),
        }
        found = interleaved({**contestants, "ours": ours})
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    table = f"dropout forward, {layout}, {dtype}"
    row(table, "x".join(map(str, shape)), 1, found, 2 * x.nbytes / 1e6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(benchmark, interleaved, row, forced, device, dtype, shape) -> None:
    x = torch.randn(shape).to(device, DTYPES[dtype], memory_format=torch.channels_last)
    x.requires_grad_()
    seeds, grad = torch.arange(shape[0], device=device), torch.ones_like(x)

    def ours() -> Tensor:
        return ops.dropout(x, seeds, P, 3)

    outputs = {name: call() for name, call in forced("dropout", ours).items()}
    outputs |= {"eager": F.dropout(x, P), "ours": ours()}

    def through(y: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)

    contestants = {name: through(y) for name, y in outputs.items()}
    found = interleaved(contestants)
    benchmark.pedantic(contestants["ours"], rounds=5, warmup_rounds=1)
    table = f"dropout backward, channels-last, {dtype}"
    row(table, "x".join(map(str, shape)), 1, found, 2 * grad.nbytes / 1e6)
