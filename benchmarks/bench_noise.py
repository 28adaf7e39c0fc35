"""Normal noise: each backend beside torch's own generator. Numbers per second in extra_info."""

from __future__ import annotations

import pytest
import torch

from palette import ops

SHAPES = [(1, 3, 64, 64), (1, 3, 256, 256), (8, 3, 256, 256)]


@pytest.mark.parametrize("backend", ["torch.randn", *ops.backends("noise")])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_noise(benchmark, shape, backend) -> None:
    benchmark.group = f"noise {list(shape)}"
    if backend == "torch.randn":
        benchmark(torch.randn, shape)
    else:
        seeds, step = torch.arange(shape[0]), torch.tensor(1)
        with ops.use(backend):
            benchmark(ops.noise, seeds, step, shape[1:])
    if benchmark.stats:  # absent under --benchmark-disable
        per_second = torch.Size(shape).numel() / benchmark.stats.stats.min
        benchmark.extra_info["million normals per second"] = round(per_second / 1e6)
