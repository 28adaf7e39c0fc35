"""Normal noise as a function of (seed, step, element, stream, layer).

Philox4x32-10 with the image's 64-bit seed as key and (element // 4, step, stream, layer) as
counter; the four words give four normals by two Box-Muller pairs. The element counts in [C, H, W]
order of one image, so an image's noise does not depend on the batch around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from palette.ops import _backends, _checks, philox
from palette.ops._registration import register

BACKENDS = ("reference", "cpp", "cuda", "triton")

TWO_PI = 6.2831854820251465
"""2 pi rounded to float32."""


def noise(
    seeds: Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    stream: int = 0,
    layer: int = 0,
) -> Tensor:
    """Standard normal noise for every seed.

    Args:
        seeds: [N] int64, one per image.
        step: 0 for the initial noise, 1, 2, ... for the solver's steps; an integer in [0, 2^32), or
            an int64 tensor on the seeds' device, scalar or [N].
        shape: of one image, such as [C, H, W].
        stream: which of the seed's independent sequences (the names are in ``palette.ops.philox``).
        layer: number of the dropout layer, or of the draw within the stream.

    Returns:
        [N, *shape] float32, contiguous, on the seeds' device. Words, uniforms and angles have the
        same bits in every backend; the normals agree to a few ulp.

    Raises:
        TypeError: seeds or step are no int64 tensors (or step no integer).
        ValueError: a shape or a device does not fit, or a number is out of range.
    """
    _check(seeds, step, shape, stream, layer)
    backend = _backends.choose("noise", seeds.device.type)
    if backend == "reference":
        return reference(seeds, step, shape, stream, layer)
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=seeds.device)
    ops, arguments = torch.ops.palette, (seeds, step, list(shape), stream, layer)
    if backend == "triton":
        out: Tensor = _backends.in_triton(ops.noise_triton, *arguments)
        return out
    out = ops.noise(*arguments)
    return out


def reference(
    seeds: Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    stream: int = 0,
    layer: int = 0,
) -> Tensor:
    """The op in plain PyTorch; logarithm, sine and cosine in float64, rounded once."""
    numel = torch.Size(shape).numel()
    padded = (numel + 3) // 4 * 4
    values = philox.words(seeds, padded, step=step, stream=stream, layer=layer)
    uniforms = philox.to_uniform(values).reshape(len(seeds), padded // 2, 2)  # [N, pair, 2]
    angle = (uniforms[..., 1] * TWO_PI).to(torch.float64)  # the product is rounded to float32
    radius = torch.sqrt(-2 * torch.log(uniforms[..., 0].to(torch.float64)))
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    normals = pairs.to(torch.float32).flatten(1)[:, :numel]
    return normals.reshape(seeds.shape[0], *shape).contiguous()


def _check(
    seeds: Tensor, step: int | Tensor, shape: Sequence[int], stream: int, layer: int
) -> None:
    op = "noise"
    _checks.tensor(op, "seeds", seeds)
    _checks.dtype(op, "seeds", seeds, (torch.int64,))
    if seeds.dim() != 1:
        raise ValueError(f"{op}: seeds has shape {list(seeds.shape)}, wanted [N]")
    if isinstance(step, Tensor):
        _checks.tensor(op, "step", step)
        _checks.dtype(op, "step", step, (torch.int64,))
        _checks.device(op, "step", step, seeds.device, "seeds")
        if step.dim() != 0 and step.shape != seeds.shape:
            raise ValueError(
                f"{op}: step has shape {list(step.shape)}, wanted [] or {list(seeds.shape)}"
                " (one per seed)"
            )
    for name, value in (("step", step), ("stream", stream), ("layer", layer)):
        if name == "step" and isinstance(value, Tensor):
            continue
        _checks.integer(op, name, value)
        if not 0 <= value < 2**32:
            raise ValueError(f"{op}: {name} is {value}, wanted a number in [0, 2^32)")
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{op}: shape is {_checks.described(shape)}, wanted a sequence of sizes")
    for size in shape:
        _checks.integer(op, "a size of shape", size)
    if any(size < 0 for size in shape) or math.prod(shape) > 2**34:
        raise ValueError(f"{op}: shape is {list(shape)}, wanted sizes >= 0, at most 2^34 elements")


def _fake(seeds: Tensor, step: Tensor, shape: Sequence[int], stream: int, layer: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)


register(
    "noise(Tensor seeds, Tensor step, SymInt[] shape, int stream, int layer) -> Tensor",
    reference,
    _fake,
)
_backends.declare("noise", BACKENDS)
