"""The SR3 U-Net: the published numbers, names and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from palette.models.sr3 import SR3UNet

SMALL: dict[str, Any] = {
    "image_size": 16,
    "norm_groups": 16,
    "channel_mults": (1, 2),
    "attention_resolutions": (8,),
    "res_blocks": 1,
}


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


def inputs(size: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, *size, generator=generator), torch.tensor([0.2, 0.9])


def test_equals_the_published_network(golden: Any, fill_by_name: Any) -> None:
    numbers = golden("sr3_unet")
    network = SR3UNet(**SMALL).eval()
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert list(shapes.items()) == list(numbers["state_shapes"].items())

    fill_by_name(network)
    x = numbers["x"].requires_grad_()
    y = network(x, numbers["gamma"])
    (y * numbers["loss_weight"]).sum().backward()
    assert_near(y.detach(), numbers["y"])
    assert_near(x.grad, numbers["grad_x"])
    norms = numbers["grad_norms"]
    ours = torch.tensor([p.grad.norm() for p in network.parameters() if p.grad is not None])
    assert_near(ours, torch.tensor([norms[key] for key, _ in network.named_parameters()]))


def test_full_size_names_and_shapes(published_shapes: Any) -> None:
    with torch.device("meta"):
        network = SR3UNet(
            image_size=256,
            channels=64,
            channel_mults=(1, 2, 4, 8),
            res_blocks=2,
            attention_resolutions=(),
        )
    shapes = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
    assert shapes == published_shapes("state_dict_sr3")
    assert sum(p.numel() for p in network.parameters()) == 55_407_235
    assert network.attention_layers == ["mid.0.attn: 32x32, 1024 tokens, 1 head of 512"]


def test_unreachable_attention_names_what_is_reachable() -> None:
    with pytest.raises(ValueError, match=r"^attention_resolutions: .* this network has 16, 8$"):
        SR3UNet(**{**SMALL, "attention_resolutions": (4,)})


def test_sqrt_gamma_is_what_the_sr3_repository_embeds() -> None:
    palette = SR3UNet(**SMALL).eval()
    sr3 = SR3UNet(**SMALL, embedding="sqrt_gamma").eval()
    sr3.load_state_dict(palette.state_dict())
    x, gamma = inputs()
    assert_near(sr3(x, gamma**2).detach(), palette(x, gamma).detach())


def test_without_noise_level_embedding() -> None:
    network = SR3UNet(**SMALL, noise_level_embedding=False).eval()
    assert not [key for key in network.state_dict() if "noise" in key]
    x, gamma = inputs()
    assert torch.equal(network(x, gamma), network(x, gamma / 2))


def test_seeded_dropout_and_any_size() -> None:
    network = SR3UNet(**SMALL, dropout=0.5).train()
    x, gamma = inputs((7, 11))
    seeds = torch.tensor([7, 8])
    both = network(x, gamma, None, seeds)
    assert both.shape == (2, 3, 7, 11)
    assert_near(network(x[1:], gamma[1:], None, seeds[1:]).detach(), both[1:].detach())
    assert not torch.allclose(network(x, gamma, None, seeds + 1), both)


def test_labels_are_refused() -> None:
    x, gamma = inputs()
    with pytest.raises(ValueError, match=r"^label: this network has no classes"):
        SR3UNet(**SMALL)(x, gamma, torch.tensor([0, 0]))


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    network = SR3UNet(**SMALL).train()
    x, gamma = inputs()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, gamma).detach(), network(x, gamma).detach())
