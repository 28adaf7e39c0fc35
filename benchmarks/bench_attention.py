"""Self-attention on packed qkv, packed result: each backend, and torch's kernel used by hand.

    pytest benchmarks/bench_attention.py

Each row is one shape [N, 3C, S, S], channels-last and on a GPU contiguous too; the contestants run
in turn and the medians are compared. "eager" is what a network does without us: split, contiguous
heads, torch's kernel, contiguous result. An implementation that is wrong in float64's eyes fails
before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from palette import ops

# The published network at 128 and 256 pixels, one sample and eight, a narrower one, and a level of
# the paper's with heads of 64 channels.
SHAPES = [
    ((1, 768, 16, 16), 8),
    ((1, 1536, 16, 16), 16),
    ((8, 1536, 16, 16), 16),
    ((1, 1536, 32, 32), 16),
    ((1, 3072, 16, 16), 16),
]
LAYOUTS = {"channels-last": torch.channels_last}
if torch.cuda.is_available():  # where torch's kernels want channels-last
    LAYOUTS["contiguous"] = torch.contiguous_format
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _eager(qkv: Tensor, heads: int, layout: torch.memory_format) -> Tensor:
    n, width, h, w = qkv.shape
    q, k, v = (
        part.transpose(-1, -2).contiguous()
        for part in qkv.reshape(n, heads, 3, width // (3 * heads), h * w).unbind(2)
    )
    out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(-1, -2).reshape(n, width // 3, h, w)
    return out.contiguous(memory_format=layout)


def _input(shape: tuple[int, ...], dtype: str, layout: torch.memory_format, device: str) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape).to(device, DTYPES[dtype], memory_format=layout)


def _check(ours: Tensor, exact: Tensor) -> None:
    """At most two roundings of the result's dtype away from float64, or 32 in float32."""
    rounding = (exact.to(ours.dtype).double() - exact).norm()
    allowed = (32 if ours.dtype == torch.float32 else 2) * rounding
    assert bool((ours.double() - exact).norm() <= allowed), "wrong: not worth a time"


@pytest.mark.parametrize(("shape", "heads"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward(benchmark, interleaved, row, forced, device, layout, dtype, shape, heads) -> None:
    qkv = _input(shape, dtype, LAYOUTS[layout], device)

    def ours() -> Tensor:
        return ops.attention(qkv, heads, "legacy")

    with torch.inference_mode():
        _check(ours(), _eager(qkv.double(), heads, LAYOUTS[layout]))
        contestants: dict[str, Callable[[], object]] = {
            "eager": lambda: _eager(qkv, heads, LAYOUTS[layout]),
            **forced("attention", ours),
        }
        found = interleaved({**contestants, "ours": ours})
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    table = f"attention forward, {layout}, {dtype}"
    row(table, f"{list(shape)} {heads} heads", 1, found, 4 / 3 * qkv.nbytes / 1e6)


@pytest.mark.parametrize(("shape", "heads"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(benchmark, interleaved, row, forced, device, dtype, shape, heads) -> None:
    qkv = _input(shape, dtype, torch.channels_last, device).requires_grad_()

    def ours() -> Tensor:
        return ops.attention(qkv, heads, "legacy")

    outputs = {name: call() for name, call in forced("attention", ours).items()}
    outputs |= {"eager": _eager(qkv, heads, torch.channels_last), "ours": ours()}
    grad = torch.randn_like(outputs["ours"])

    def through(y: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, qkv, grad, retain_graph=True)

    contestants = {name: through(y) for name, y in outputs.items()}
    found = interleaved(contestants, seconds=0.06)
    benchmark.pedantic(contestants["ours"], rounds=5, warmup_rounds=1)
    table = f"attention backward, channels-last, {dtype}"
    row(table, f"{list(shape)} {heads} heads", 1, found, 8 / 3 * qkv.nbytes / 1e6)
