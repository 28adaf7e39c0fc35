"""group_norm_silu in every instruction set that this processor has, and SiLU over all floats.

The set is chosen when the first kernel runs, so each has its own process: this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from palette import _extension, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (  # channels that fill whole vectors, pairs of them, and neither
    ((2, 96, 9, 7), 32, "channels_last"),
    ((1, 50, 13, 11), 5, "channels_last"),
    ((1, 64, 40, 40), 32, "channels_last"),
    ((2, 12, 9, 7), 4, "contiguous"),
    ((1, 6, 50, 41), 3, "contiguous"),
    ((3, 37), 1, "contiguous"),
)
# The largest error of SiLU in units in the last place of the result; 0.5 is one rounding.
ULP = {torch.float32: 4.0, torch.float16: 0.52, torch.bfloat16: 0.55, torch.float64: 4.0}


def present() -> list[str]:
    """The sets that PALETTE_CPU_ISA may name here."""
    found = set(_extension.instruction_sets())
    needs = {
        "baseline": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    needs["avx512_bf16"] = needs["avx512"] | {"avx512bf16"}
    return [name for name, wanted in needs.items() if wanted <= found]


def inputs() -> Iterator[tuple[list[Tensor], int]]:
    """x, weight, bias, scale, shift and the gradient of y; groups."""
    g = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape, groups, layout in SHAPES:
            n, c = shape[:2]
            sizes = (shape, (c,), (c,), (n, c), (n, c), shape)
            tensors = [torch.randn(size, generator=g).to(dtype) for size in sizes]
            if layout == "channels_last":
                for i in (0, 5):
                    tensors[i] = tensors[i].contiguous(memory_format=torch.channels_last)
            yield tensors, groups


def arguments_of_silu(dtype: torch.dtype) -> Tensor:
    """Arguments in float32 (float64) from the smallest to the largest, and each kind of special."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ordinary = torch.linspace(-110, 110, 100_001, dtype=wide)
    powers = 2.0 ** torch.linspace(-120, 127.99, 5_001, dtype=wide)
    special = torch.tensor([0.0, -0.0, float("nan"), 3.4e38, -3.4e38, 1e-40], dtype=wide)
    return torch.cat((ordinary, powers, -powers, special))


def silu_of(z: Tensor, dtype: torch.dtype) -> Tensor:
    """The op's SiLU of any z: with a weight of 0 the bias is what goes in."""
    x = torch.randn(1, z.numel(), generator=torch.Generator().manual_seed(0)).to(dtype)
    return ops.group_norm_silu(x, torch.zeros_like(z), z, 1)[0]


def results() -> dict[str, list[Tensor]]:
    """What the parent looks at."""
    outputs = []
    for (x, weight, bias, scale, shift, grad), groups in inputs():
        tensors = [t.requires_grad_() for t in (x, weight, bias, scale, shift)]
        y = ops.group_norm_silu(x, weight, bias, groups, 1e-5, scale, shift)
        outputs += [y.detach(), *torch.autograd.grad(y, tensors, grad)]
    return {"ops": outputs, "silu": [silu_of(arguments_of_silu(dtype), dtype) for dtype in DTYPES]}


@pytest.fixture(scope="module")
def exact() -> list[Tensor]:
    """Output and gradients of every input in float64, by plain PyTorch."""
    outputs = []
    for tensors, groups in inputs():
        x, weight, bias, scale, shift, grad = (t.double().contiguous() for t in tensors)
        wanted = [t.requires_grad_() for t in (x, weight, bias, scale, shift)]
        rows = (*scale.shape, *(1,) * (x.dim() - 2))
        y = F.group_norm(x, groups, weight, bias)
        y = F.silu(y * (1 + scale.reshape(rows)) + shift.reshape(rows))
        outputs += [y.detach(), *torch.autograd.grad(y, wanted, grad)]
    return outputs


@pytest.fixture(scope="module", params=present())
def computed(request, tmp_path_factory) -> dict[str, list[Tensor]]:
    """``results()`` of a process that runs with one instruction set."""
    file = tmp_path_factory.mktemp(request.param) / "results.pt"
    environment = os.environ | {"PALETTE_CPU_ISA": request.param, "PALETTE_BACKEND": "cpp"}
    subprocess.run([sys.executable, __file__, str(file)], check=True, env=environment)
    return torch.load(file, weights_only=True)


def test_values_and_gradients(computed, exact, within) -> None:
    assert len(computed["ops"]) == len(exact) == 6 * len(DTYPES) * len(SHAPES)
    for value, wanted in zip(computed["ops"], exact, strict=True):
        within(value, wanted, value.dtype, 32 if value.dtype.itemsize >= 4 else 1.05)


def test_silu_of_every_size_of_float(computed) -> None:
    for dtype, value in zip(DTYPES, computed["silu"], strict=True):
        z = arguments_of_silu(dtype)
        wanted = F.silu(z.double())
        assert torch.equal(value.isnan(), z.isnan())
        assert value[z < -110].double().abs().max() < 1e-45
        limit = torch.finfo(dtype)
        inside = (wanted.abs() >= limit.tiny * 1e3) & (wanted.abs() <= limit.max)
        unit = 2.0 ** wanted[inside].abs().log2().floor() * limit.eps
        error = ((value[inside].double() - wanted[inside]).abs() / unit).nan_to_num()
        if (
            dtype == torch.float32
        ):  # below zero silu(z) ~ z e^z: what one unit in z's last place does
            of_z = 2.0 ** z[inside].double().abs().log2().floor() * limit.eps
            error -= torch.where(z[inside] < -1, of_z * wanted[inside].abs() / unit, 0)
        assert error.max() <= ULP[dtype], f"{dtype}: {error.max()} at {z[inside][error.argmax()]}"


def test_unknown_set_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("PALETTE_CPU_ISA", "avx9")
    monkeypatch.setenv("PALETTE_BACKEND", "cpp")
    call = "ops.group_norm_silu(torch.ones(1, 2), None, None, 1)"
    code = f"import torch; from palette import ops; {call}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "PALETTE_CPU_ISA is 'avx9', wanted baseline, avx2, avx512 or avx512_bf16" in run.stderr


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
