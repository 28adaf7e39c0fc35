"""The compiled backends at every layer of the real networks, forward and backward, by float64.

The kernel runs on the whole layer; what is compared are its first and last groups and two between,
which hold every row and every seam, and no number may be large: memory is poisoned. The soak
compares every group, in every dtype and layout, at larger batches.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import pytest
import torch
from torch import Tensor

from palette import ops

CASES = sys.modules["palette_op_cases"]
GROUPS = 32
# Channels at each side of a 256-pixel image: every GroupNorm of the published network ...
PUBLISHED = {
    256: (64, 128, 192),
    128: (64, 128, 192, 256, 384),
    64: (128, 256, 384, 512, 768),
    32: (256, 512, 768, 1024),
}
# ... and of the paper's
PAPER = {
    256: (256, 512),
    128: (256, 512, 768),
    64: (256, 512, 768, 1024),
    32: (512, 1024, 1536),
    16: (512, 1024, 1536, 2048),
    8: (1024, 2048),
}
NORMS = sorted(
    {(c, side) for network in (PUBLISHED, PAPER) for side in network for c in network[side]}
)
# channels of qkv, heads, side: the published network, then the paper's
ATTENTIONS = [(1536, 16, 32), (1536, 8, 32), (3072, 16, 16), (3072, 16, 8)]
IMAGES = [(1, 3, side, side) for side in (64, 128, 256)] + [(8, 3, 64, 64)]


def compiled(op: str) -> list[tuple[str, str]]:
    return [each for each in CASES.places(op) if each[0] not in ("reference", "sdpa")]


def in_compiled(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "device"), compiled(op))


@functools.cache
def normals() -> Tensor:
    return torch.randn(512 * 256 * 256 + 8192, generator=torch.Generator().manual_seed(0))


def drawn(shape: tuple[int, ...], start: int, centre: float = 0.0) -> Tensor:
    """Normal numbers, each call's its own for another ``start``."""
    numbers = normals()[start : start + torch.Size(shape).numel()]
    return centre + numbers.view(shape)


def test_the_heap_is_poisoned() -> None:
    """What a compiled op leaves unwritten is 3.4e38, not what happened to lie there."""
    if sys.platform != "linux" or "libasan" in os.environ.get("LD_PRELOAD", ""):
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    for size in (4096, 2**24):  # the smallest ones keep the 0x80 that freeing left
        place = libc.malloc(size)
        assert set(ctypes.string_at(place, size)) == {0x7F}
        libc.free(place)


def check_norm(within, shape, dtype, layout, chosen, backend, device) -> None:
    n, c, *_ = shape
    x, grad = drawn(shape, 0, -0.3).to(dtype), drawn(shape, 4001).to(dtype)
    tensors = {
        "x": CASES.LAYOUTS[layout](x).to(device),
        "weight": drawn((c,), 11, 1.0).to(device),
        "bias": drawn((c,), 3011).to(device),
        "scale": 0.3 * drawn((n, c), 17).to(device),
        "shift": 0.3 * drawn((n, c), 6007).to(device),
    }
    given = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    with ops.use(backend):
        y = ops.group_norm_silu(groups=GROUPS, **given)
        y.backward(CASES.LAYOUTS[layout](grad).to(device))
    for written in (y, given["x"].grad):
        assert written.detach().abs().max() < 1e3

    size = c // GROUPS
    members = torch.cat([torch.arange(g * size, (g + 1) * size) for g in chosen])

    def part(value: Tensor) -> Tensor:
        """The chosen groups in float64 on the CPU."""
        channels = members.to(value.device)
        return value.detach().index_select(min(value.dim() - 1, 1), channels).cpu().double()

    exact = {name: part(value).requires_grad_() for name, value in tensors.items()}
    reference = sys.modules["palette.ops.group_norm_silu"].reference
    wanted = reference(groups=len(chosen), **exact)
    wanted.backward(part(grad))
    half = dtype != torch.float32
    within(part(y), wanted, dtype, 1.05 if half else 8, "y")
    within(part(given["x"].grad), exact["x"].grad, dtype, 1.05 if half else 16, "x")
    for name in ("weight", "bias", "scale", "shift"):
        # as in test_group_norm_silu.py: with half inputs an exponential good to 20 bits will do
        within(part(given[name].grad), exact[name].grad, torch.float32, 64 if half else 16, name)


@pytest.mark.parametrize(("channels", "side"), NORMS)
@in_compiled("group_norm_silu")
def test_group_norm_silu(within, backend, device, channels, side) -> None:
    shape = (1, channels, side, side)
    check_norm(
        within, shape, torch.bfloat16, "channels_last", (0, 13, 22, GROUPS - 1), backend, device
    )


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "side"), NORMS)
@in_compiled("group_norm_silu")
def test_group_norm_silu_whole(within, backend, device, channels, side, dtype, layout) -> None:
    batch = 3 if channels * side * side <= 2**22 else 1
    shape = (batch, channels, side, side)
    check_norm(within, shape, dtype, layout, range(GROUPS), backend, device)


def check_attention(within, channels, heads, side, order, dtype, backend, device) -> None:
    qkv = CASES.LAYOUTS["channels_last"](drawn((1, channels, side, side), 0).to(dtype)).to(device)
    qkv.requires_grad_()
    with ops.use(backend):
        out = ops.attention(qkv, heads, order)
    grad = drawn(tuple(out.shape), 4001).to(dtype)
    out.backward(grad.to(device))
    exact = qkv.detach().cpu().double().requires_grad_()
    wanted = sys.modules["palette.ops.attention"].reference(exact, heads, order)
    wanted.backward(grad.double())
    half = 1.05 if backend == "cpp" else 4.0  # tensor cores take rounded weights
    factor = 32.0 if dtype == torch.float32 else half
    within(out, wanted, dtype, factor, "out")
    within(qkv.grad, exact.grad, dtype, 2 * factor, "qkv")


@pytest.mark.parametrize(("channels", "heads", "side"), ATTENTIONS)
@in_compiled("attention")
def test_attention(within, backend, device, channels, heads, side) -> None:
    check_attention(within, channels, heads, side, "legacy", torch.bfloat16, backend, device)


@pytest.mark.soak
@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "heads", "side"), ATTENTIONS)
@in_compiled("attention")
def test_attention_whole(within, backend, device, channels, heads, side, dtype, order) -> None:
    check_attention(within, channels, heads, side, order, dtype, backend, device)


@pytest.mark.parametrize(("channels", "side"), [(64, 128), (512, 32), (1024, 8)])
@in_compiled("dropout")
def test_dropout(backend, device, channels, side) -> None:
    x = drawn((2, channels, side, side), 0).to(torch.bfloat16)
    seeds = torch.tensor([7, -8])
    wanted = sys.modules["palette.ops.dropout"].reference(x, seeds, 0.2, 9)
    for layout in ("channels_last", "contiguous"):
        with ops.use(backend):
            y = ops.dropout(CASES.LAYOUTS[layout](x).to(device), seeds.to(device), 0.2, 9)
        assert torch.equal(y.cpu(), wanted)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@in_compiled("reverse_step")
def test_reverse_step(backend, device, shape) -> None:
    """With noise made in the kernel, a mask, history, and a slot in the next network input."""
    case = CASES.StepCase(
        shape, torch.bfloat16, draw="seeds", history=True, mask="fraction", slot="channels_last"
    )
    arguments, same = case.arguments(device), case.arguments()
    with ops.use(backend):
        z = ops.noise(arguments["seeds"], arguments["step"] + 1, shape[1:])
        ops.reverse_step(**arguments)
    exact = sys.modules["palette.ops.noise"].reference(same["seeds"], same["step"] + 1, shape[1:])
    assert torch.allclose(z.cpu(), exact, rtol=1e-6, atol=1e-7)
    same.update(noise=z.cpu(), seeds=None)  # its own normals: a few ulp from the reference's
    sys.modules["palette.ops.reverse_step"].reference(**same)
    for name in ("state", "history", "slot"):
        assert torch.equal(arguments[name].cpu(), same[name]), name
