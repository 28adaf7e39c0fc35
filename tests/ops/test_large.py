"""Tensors of more than 2^31 elements, whole: ``make soak``, where there is the memory.

What any machine can show, a last sample that lies so far away, is in test_<op>.py.
"""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from palette import ops
from palette.ops import philox

CASES = sys.modules["palette_op_cases"]
pytestmark = pytest.mark.soak


def needs(device: str, gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free memory")


def places(op: str) -> list[tuple[str, str]]:
    return [each for each in CASES.places(op) if each[0] not in ("reference", "sdpa")]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("backend", "device"), places("group_norm_silu"))
def test_group_norm_silu(backend, device, layout) -> None:
    """The last of 8194 samples has the bits that it has alone."""
    needs(device, 11)
    shape = (2**31 // 2**18 + 2, 64, 64, 64)
    g = torch.Generator().manual_seed(0)
    last = CASES.LAYOUTS[layout](torch.randn(1, *shape[1:], generator=g)).bfloat16().to(device)
    flat = torch.zeros(shape[0] * 2**18, dtype=torch.bfloat16, device=device)
    x = flat.as_strided(shape, (2**18, *last.stride()[1:]))
    x[-1:] = last
    with ops.use(backend), torch.no_grad():
        many = ops.group_norm_silu(x, None, None, 32)[-1:].clone()
        assert torch.equal(many, ops.group_norm_silu(last, None, None, 32))


@pytest.mark.parametrize(("backend", "device"), places("noise"))
def test_noise(backend, device) -> None:
    """The last numbers of an image of 2^31 + 6, from the words of their counters."""
    needs(device, 11)
    elements, seed = 2**31 + 6, -5
    with ops.use(backend):
        z = ops.noise(torch.tensor([seed], device=device), 3, (elements,))[0, -6:].cpu()
    counter = torch.arange(elements // 4 - 1, elements // 4 + 1)
    zero = torch.zeros_like(counter)
    words = philox.philox4x32(
        (counter, zero + 3, zero, zero), (zero + seed % 2**32, zero + (seed >> 32) % 2**32)
    )
    uniforms = philox.to_uniform(torch.stack(words, -1)).reshape(-1, 2)[:3]
    radius = torch.sqrt(-2 * torch.log(uniforms[:, 0].double()))
    angle = (uniforms[:, 1] * 6.2831854820251465).double()
    wanted = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten()
    assert torch.allclose(z.double(), wanted, rtol=1e-6, atol=1e-7)
