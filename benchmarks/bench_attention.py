"""Self-attention on packed qkv: each backend, and torch's kernel with the shuffles around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from palette import ops

# [N, 3C, H, W] and heads: the published network at 128 and 256 pixels, a level of the paper's
SHAPES = [((1, 1536, 16, 16), 16), ((1, 1536, 32, 32), 16), ((1, 3072, 16, 16), 16)]


def as_usual(qkv: Tensor, heads: int, order: str) -> Tensor:
    """What a network does by hand: split, contiguous heads, torch's kernel, contiguous result."""
    n, width, h, w = qkv.shape
    q, k, v = (
        part.transpose(-1, -2).contiguous()
        for part in qkv.reshape(n, heads, 3, width // (3 * heads), h * w).unbind(2)
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(-1, -2).reshape(n, width // 3, h, w)


@pytest.mark.parametrize("backend", ["by hand", *ops.backends("attention")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "heads"), SHAPES, ids=str)
def test_attention(benchmark, shape, heads, dtype, backend) -> None:
    benchmark.group = f"attention {list(shape)}, {heads} heads, {dtype}, channels-last"
    qkv = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        if backend == "by hand":
            benchmark(as_usual, qkv, heads, "legacy")
        else:
            with ops.use(backend):
                benchmark(ops.attention, qkv, heads, "legacy")
