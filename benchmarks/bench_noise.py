"""Normal noise: each backend beside torch's own generator.

pytest benchmarks/bench_noise.py
"""

from __future__ import annotations

import pytest
import torch

from palette import ops

SHAPES = [(1, 3, 64, 64), (1, 3, 256, 256), (8, 3, 256, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise(benchmark, interleaved, row, forced, device, shape) -> None:
    seeds = torch.arange(shape[0], device=device)
    step = torch.tensor(1, device=device)

    def ours() -> torch.Tensor:
        return ops.noise(seeds, step, shape[1:])

    contestants = {
        "eager": lambda: torch.randn(shape, device=device),  # another stream, no seed per image
        **forced("noise", ours),
    }
    found = interleaved({**contestants, "ours": ours}, seconds=0.3)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    row("noise", str(list(shape)), 1, found, 4 * torch.Size(shape).numel() / 1e6)
