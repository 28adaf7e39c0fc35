"""One solver step: each backend beside the published sampler's lines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palette import ops

SHAPES = [(1, 3, 64, 64), (1, 3, 256, 256), (8, 3, 256, 256)]


def as_published(
    state: Tensor, output: Tensor, table: Tensor, step: Tensor, known: Tensor, mask: Tensor
) -> Tensor:
    """The sampler's arithmetic with torch's generator, and the next network input by cat."""
    a, b, c1, c2, _, sigma = table[step]
    x0 = (a * state + b * output).clamp_(-1, 1)
    y = c1 * x0 + c2 * state + sigma * torch.randn_like(state)
    y = known * (1.0 - mask) + mask * y
    return torch.cat((known, y), dim=1)


@pytest.mark.parametrize("backend", ["as published", *ops.backends("reverse_step")])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_reverse_step(benchmark, shape, backend) -> None:
    n, c, h, w = shape
    benchmark.group = f"reverse_step {list(shape)}, mask, noise and slot"
    state, output, known = (torch.randn(shape) for _ in range(3))
    mask = torch.rand(n, 1, h, w).round()
    table, step = torch.tensor([[1.01, -0.1, 0.3, 0.7, 0.0, 0.1]]), torch.tensor(0)
    if backend == "as published":
        benchmark(as_published, state, output, table, step, known, mask)
        return
    wide = torch.zeros(n, 2 * c, h, w).contiguous(memory_format=torch.channels_last)
    options = {"seeds": torch.arange(n), "known": known, "mask": mask, "slot": wide[:, c:]}
    with ops.use(backend):
        benchmark(lambda: ops.reverse_step(state, output, table, step, **options))
