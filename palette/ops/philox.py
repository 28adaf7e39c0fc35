"""Philox4x32-10, the counter-based generator behind every random number of the package.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number is a
function of (seed, element, step, stream, layer) alone: no state, so the same in a batch or alone,
on every device, and after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

SAMPLING, CONDITION, TRAINING, DROPOUT, NOISE_LEVEL, LABEL_DROP, AUGMENTATION = range(7)
"""The streams: independent sequences of the same seed."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

_Words = TypeVar("_Words", bound=Any)


def philox4x32(counter: Sequence[_Words], key: Sequence[_Words]) -> tuple[_Words, ...]:
    """Four random words for every counter.

    Args:
        counter: four int64 NumPy arrays or torch tensors of values in [0, 2^32) that broadcast
            together.
        key: two of the same.

    Returns:
        Four int64 arrays of values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap modulo 2^64; the mask takes the right 32 bits all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(
    seeds: Tensor, numel: int, *, step: int | Tensor = 0, stream: int = 0, layer: int = 0
) -> Tensor:
    """The first ``numel`` words of every seed.

    Args:
        seeds: [N] int64.
        numel: words per seed.
        step: an integer in [0, 2^32), or an int64 tensor, scalar or [N].
        stream, layer: integers in [0, 2^32).

    Returns:
        [N, numel] int64 of values in [0, 2^32).
    """
    blocks = (numel + 3) // 4
    block = torch.arange(blocks, dtype=torch.int64, device=seeds.device)
    zero = torch.zeros_like(block)
    steps = torch.as_tensor(step, dtype=torch.int64, device=seeds.device).reshape(-1, 1) & _MASK
    key = seeds.reshape(-1, 1)
    out = philox4x32(
        (block, zero + steps, zero + stream, zero + layer), (key & _MASK, (key >> 32) & _MASK)
    )
    return torch.stack(out, dim=-1).flatten(1)[:, :numel]  # [N, numel]


def to_uniform(values: Tensor) -> Tensor:
    """Words in [0, 2^32) as float32 numbers in (0, 1]: word * 2^-32 + 2^-33, rounded.

    The largest 129 words round to exactly 1.
    """
    return values.to(torch.float32) * 2.0**-32 + 2.0**-33


def uniform(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    step: int | Tensor = 0,
    stream: int,
    layer: int = 0,
) -> Tensor:
    """Uniform numbers [N, *shape] float32 in (0, 1], one word each; 1 itself is possible.

    Args:
        seeds: [N] int64, one per sample.
        shape: of one sample.
        step, stream, layer: the rest of the counter (see ``words``).
    """
    numel = torch.Size(shape).numel()
    values = words(seeds, numel, step=step, stream=stream, layer=layer)
    return to_uniform(values).reshape(seeds.shape[0], *shape).contiguous()
