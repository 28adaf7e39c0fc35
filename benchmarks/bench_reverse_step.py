"""One solver step with noise, mask and the next input: each backend, and the published lines.

    pytest benchmarks/bench_reverse_step.py

The network's output and the next input are channels-last in the network's dtype. The contestants
run in turn and the medians are compared. A result that is not that of the published order of
operations fails before it is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from palette import ops

SHAPES = [(1, 3, 64, 64), (1, 3, 128, 128), (1, 3, 256, 256), (8, 3, 256, 256)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TABLE = torch.tensor([[1.01, -0.1, 0.3, 0.7, 0.0, 0.1]])


def _eager(state: Tensor, output: Tensor, z: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The sampler's arithmetic."""
    a, b, c1, c2, _, sigma = TABLE[0].tolist()
    x0 = (a * state + b * output.float()).clamp_(-1, 1)
    y = c1 * x0 + c2 * state + sigma * z
    return known * (1.0 - mask) + mask * y


def _step(state: Tensor, output: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The same with torch's generator, and the next network input by cat."""
    y = _eager(state, output, torch.randn_like(state), known, mask)
    wide = torch.cat((known, y), dim=1)
    return wide.to(output.dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(benchmark, interleaved, row, forced, device, dtype, shape) -> None:
    n, c, h, w = shape
    torch.manual_seed(n + h)
    state, known = torch.randn(shape, device=device), torch.randn(shape, device=device)
    output = torch.randn(shape).to(device, DTYPES[dtype], memory_format=torch.channels_last)
    mask = torch.rand(n, 1, h, w, device=device).round()
    wide = torch.zeros(n, 2 * c, h, w, dtype=output.dtype, device=device)
    wide = wide.contiguous(memory_format=torch.channels_last)
    seeds, step = torch.arange(n, device=device), torch.tensor(0, device=device)
    table = TABLE.to(device)
    options: dict[str, Any] = {"seeds": seeds, "known": known, "mask": mask, "slot": wide[:, c:]}

    def ours() -> None:
        ops.reverse_step(state, output, table, step, **options)

    exact = _eager(state, output, ops.noise(seeds, step + 1, shape[1:]), known, mask)
    ours()
    assert (state - exact).abs().max() <= 1e-6, "wrong: not worth a time"
    contestants = {
        "eager": lambda: _step(state, output, known, mask),
        **forced("reverse_step", ours),
    }
    with torch.inference_mode():  # as a sampler runs
        found = interleaved({**contestants, "ours": ours}, seconds=0.3)
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    moved = (2 * state.nbytes + known.nbytes + mask.nbytes + 2 * output.nbytes) / 1e6
    row(f"reverse_step, mask, noise and slot, {dtype}", str(list(shape)), 1, found, moved)
