"""The optimizer's step for all weights of the published network, with clipping and the average.

    pytest benchmarks/bench_adamw.py

"eager" is PyTorch's own for float32 gradients: ``clip_grad_norm_``, fused ``AdamW``, the average
by ``_foreach_lerp_``, the rounding to copies by ``_foreach_copy_``, on contiguous weights, with
which it is fastest. "ours" takes the gradients in the dtype of the row, as ``palette train`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_sampling import published_network
from torch import Tensor

from palette import ops

LR, DECAY, LIMIT = 5e-5, 0.9999, 1.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class _State:
    """Weights, gradients, moments, averages and copies of a network."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        self.weights = weights
        self.grads = [(torch.randn_like(each) * 1e-3).to(dtype) for each in weights]
        self.means, self.squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        self.steps = [torch.zeros(()) for _ in weights]
        self.averages = [each.clone() for each in weights]
        self.copies = [each.bfloat16() for each in weights]


def _eager(state: _State) -> Callable[[], object]:
    for weight, grad in zip(state.weights, state.grads, strict=True):
        weight.grad = grad
    optimizer = torch.optim.AdamW(state.weights, lr=LR, weight_decay=0.0, fused=True)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(state.weights, LIMIT)
        optimizer.step()
        torch._foreach_lerp_(state.averages, state.weights, 1 - DECAY)
        torch._foreach_copy_(state.copies, state.weights)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_step(benchmark, interleaved, row, forced, device, dtype) -> None:
    weights = [each.detach().to(device) for each in published_network().parameters()]
    state = _State(weights, DTYPES[dtype])
    plain = _State([each.contiguous() for each in weights], torch.float32)
    options: dict[str, Any] = {"lr": LR, "limit": LIMIT, "take": 1 - DECAY}

    def ours() -> Tensor:
        lists = (state.weights, state.grads, state.means, state.squares, state.steps)
        return ops.adamw(*lists, state.averages, state.copies, **options)

    contestants = {"eager": _eager(plain), **forced("adamw", ours), "ours": ours}
    with torch.no_grad():
        found = interleaved(contestants, seconds=1.0)
        benchmark.pedantic(ours, rounds=3)
    lists = (state.weights, state.means, state.squares, state.averages, state.copies)
    moved = 2 * sum(each.nbytes for group in lists[:4] for each in group)
    moved += sum(each.nbytes for group in (state.copies, state.grads) for each in group)
    row("adamw, the published network", dtype + " gradients", 1, found, moved / 1e6)
