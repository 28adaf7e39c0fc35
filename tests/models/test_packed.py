from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from palette.models import packed
from palette.models.packed import PackedConv, SubpixelConv, pack
from palette.models.sr3 import SR3UNet
from palette.models.unet import UNet

DTYPES = [torch.float32, torch.bfloat16]


def unet(**options) -> UNet:
    torch.manual_seed(0)
    return UNet(
        image_size=16,
        in_channels=6,
        out_channels=3,
        channels=32,
        channel_mults=(1, 2),
        attention_resolutions=(8,),
        zero_init=False,
        **options,
    ).eval()


def sr3() -> SR3UNet:
    torch.manual_seed(0)
    sizes = {"channels": 32, "channel_mults": (1, 2), "image_size": 16}
    options = {"attention_resolutions": (8,), "norm_groups": 32, "res_blocks": 1}
    return SR3UNet(in_channels=6, out_channels=3, **sizes, **options).eval()


def image(count: int = 2, side: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 6, side, side).to(dtype)


def test_this_torch_has_the_operators() -> None:
    assert packed.available()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        unet,
        lambda: unet(resblock_updown=False, scale_shift=False),
        lambda: unet(attention="local"),
        lambda: unet(attention="dilated"),
        sr3,
    ],
)
@torch.no_grad()
def test_same_answers(make, dtype) -> None:
    network, gamma = make(), torch.tensor([0.3, 0.9])
    exact = copy.deepcopy(network).double()(image().double(), gamma.double())
    network = network.to(dtype)
    plain, fast = network(image(dtype=dtype), gamma), pack(network)(image(dtype=dtype), gamma)
    assert fast.dtype == plain.dtype
    error, allowed = (fast.double() - exact).norm(), (plain.double() - exact).norm()
    assert error <= 1.2 * allowed


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 4, 7), (1, 32, 8, 8)])
@torch.no_grad()
def test_enlarging_and_convolving_at_once(shape) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(shape[1], 5, 3, padding=1), torch.randn(shape)
    wanted = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    found = SubpixelConv(conv.weight, conv.bias)(x)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5)


@torch.no_grad()
def test_every_convolution_is_packed_and_no_parameter_copied() -> None:
    network = unet()
    fast = pack(network)
    assert not any(isinstance(each, (nn.Conv2d, nn.Conv1d)) for each in fast.modules())
    assert any(isinstance(each, PackedConv) for each in fast.modules())
    assert {id(p) for p in fast.parameters()} < {id(p) for p in network.parameters()}
    assert any(isinstance(each, nn.Conv2d) for each in network.modules())


def test_dilated_convolutions_stay_plain() -> None:
    fast = pack(unet(attention="dilated"))
    left = [each for each in fast.modules() if isinstance(each, nn.Conv2d)]
    assert left
    assert all(each.dilation > (1, 1) for each in left)


@torch.no_grad()
def test_sizes_that_came_before_leave_no_trace() -> None:
    network, gamma = unet().to(torch.bfloat16), torch.tensor([0.3])
    fast = pack(network)
    first = fast(image(1, dtype=torch.bfloat16), gamma)
    fast(image(3, 24, torch.bfloat16), gamma.expand(3))
    assert torch.equal(fast(image(1, dtype=torch.bfloat16), gamma), first)
    again = pack(network)
    again(image(3, dtype=torch.bfloat16), gamma.expand(3))
    assert torch.equal(again(image(1, dtype=torch.bfloat16), gamma), first)


def test_a_layer_with_a_hook_keeps_it() -> None:
    network, seen = unet(), []
    network.out[-1].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        pack(network)(image(), torch.tensor([0.3, 0.9]))
    assert seen == [1]


def test_without_the_operators_the_network_stays(monkeypatch) -> None:
    def gone(*_: object) -> None:
        raise AttributeError("_reorder_convolution_weight")

    monkeypatch.setattr(PackedConv, "__init__", gone)
    packed.available.cache_clear()
    network = unet()
    try:
        assert pack(network) is network
    finally:
        packed.available.cache_clear()


def test_float16_stays_plain() -> None:
    """oneDNN packs it on few processors, and PyTorch computes it on all."""
    fast = pack(unet().half())
    assert not any(isinstance(each, PackedConv) for each in fast.modules())
