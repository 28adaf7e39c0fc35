"""The guided-diffusion U-Net: the published numbers, names and options, and our own additions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palette.models.layers import (
    AttentionBlock,
    GroupNormSiLU,
    ResBlock,
    pad_by_reflection,
    windowed_attention,
)
from palette.models.unet import UNet
from palette.ops import attention

SMALL: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 6,
    "out_channels": 3,
    "channels": 32,
    "channel_mults": (1, 2),
    "res_blocks": 1,
    "attention_resolutions": (8,),
    "zero_init": False,
}
GOLDEN_OPTIONS: dict[str, dict[str, Any]] = {
    "guided_unet_default": {"attention_resolutions": (8,), "head_channels": 16},
    "guided_unet_plain": {
        "attention_resolutions": (16,),
        "head_channels": None,
        "heads": 4,
        "scale_shift": False,
        "resblock_updown": False,
    },
}
PUBLISHED: dict[str, Any] = {
    "image_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "attention_resolutions": (),
    "head_channels": 32,
    "attention_order": "legacy",
    "embedding": "gamma",
}


def inputs(count: int = 2, size: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, *size, generator=generator)
    return x, torch.rand(count, generator=generator)


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", GOLDEN_OPTIONS)
def test_equals_the_published_network(name: str, golden: Any, fill_by_name: Any) -> None:
    numbers = golden(name)
    order = "new" if name.endswith("plain") else "legacy"
    options = {**SMALL, **GOLDEN_OPTIONS[name], "attention_order": order, "embedding": "gamma"}
    network = UNet(**options, dropout=0.2).eval()
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert list(shapes.items()) == list(numbers["state_shapes"].items())

    fill_by_name(network)
    x = numbers["x"].requires_grad_()
    y = network(x, numbers["gamma"])
    (y * numbers["loss_weight"]).sum().backward()
    assert_near(y.detach(), numbers["y"])
    assert_near(x.grad, numbers["grad_x"])
    norms = numbers["grad_norms"]
    assert set(norms) == {key for key, _ in network.named_parameters()}
    ours = torch.tensor([p.grad.norm() for p in network.parameters() if p.grad is not None])
    assert_near(ours, torch.tensor([norms[key] for key, _ in network.named_parameters()]))


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("state_dict_published_256", {}, 62_641_347),
        (
            "state_dict_paper_size",
            {
                "channels": 256,
                "channel_mults": (1, 1, 2, 2, 4, 4),
                "attention_resolutions": (32, 16, 8),
                "head_channels": 64,
            },
            552_814_083,
        ),
    ],
)
def test_full_size_names_and_shapes(
    name: str, options: dict[str, Any], count: int, published_shapes: Any
) -> None:
    with torch.device("meta"):
        network = UNet(**{**PUBLISHED, **options})
    assert [(k, tuple(v.shape)) for k, v in network.state_dict().items()] == published_shapes(name)
    assert sum(p.numel() for p in network.parameters()) == count


def test_attention_layers_are_named_by_pixel_resolution() -> None:
    with torch.device("meta"):
        published = UNet(**PUBLISHED)
        paper = UNet(
            **{**PUBLISHED, "channels": 256, "channel_mults": (1, 1, 2, 2, 4, 4)}
            | {"attention_resolutions": (32, 16, 8), "head_channels": 64}
        )
    assert published.attention_layers == ["middle_block.1: 32x32, 1024 tokens, 16 heads of 32"]
    names = [line.split(":")[0] for line in paper.attention_layers]
    inside = [f"input_blocks.{i}.1" for i in (10, 11, 13, 14, 16, 17)]
    outside = [f"output_blocks.{i}.1" for i in range(9)]
    assert names == [*inside, "middle_block.1", *outside]
    assert paper.attention_layers[0] == "input_blocks.10.1: 32x32, 1024 tokens, 8 heads of 64"


def test_attention_of_a_wide_image_goes_by_the_shorter_side() -> None:
    network = UNet(**{**SMALL, "image_size": (16, 32)})
    assert network.attention_layers[0] == "input_blocks.3.1: 8x16, 128 tokens, 2 heads of 32"


def test_unreachable_attention_names_what_is_reachable() -> None:
    with pytest.raises(
        ValueError, match=r"^attention_resolutions: .* 24x24 this network has 24, 12"
    ):
        UNet(**{**SMALL, "image_size": 24})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("channels", 33),
        ("channels", 48),
        ("channel_mults", ()),
        ("res_blocks", 0),
        ("dropout", 1.0),
        ("head_channels", 24),
        ("attention_order", "old"),
        ("embedding", "time"),
        ("num_classes", 0),
        ("image_size", 0),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument}"):
        UNet(**{**SMALL, argument: value})


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 9), (16, 16)])
def test_any_size(size: tuple[int, int]) -> None:
    x, gamma = inputs(1, size)
    assert UNet(**SMALL).eval()(x, gamma).shape == (1, 3, *size)


def test_channels_last_from_end_to_end() -> None:
    network = UNet(**SMALL).eval()
    seen = []
    for module in network.modules():
        if isinstance(module, (GroupNormSiLU, nn.Conv2d, ResBlock, AttentionBlock)):
            module.register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
    network(*inputs())
    assert len(seen) > 40
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_weights(half: torch.dtype) -> None:
    network = UNet(**SMALL).eval()
    x, gamma = inputs()
    exact = network(x, gamma)
    y = network.to(half)(x, gamma)
    assert y.dtype == half
    assert_near(y.float(), exact, 0.05)


def test_zero_initialised_outputs() -> None:
    network = UNet(**{**SMALL, "zero_init": True})
    zeros = {k for k, v in network.named_parameters() if v.ndim > 1 and not v.any()}
    wanted = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    assert zeros == {k for k, _ in network.named_parameters() if k.endswith(wanted)}
    assert not network(*inputs()).any()


def test_labels() -> None:
    network = UNet(**SMALL, num_classes=4).eval()
    x, gamma = inputs()
    assert network.label_emb.weight.shape == (5, 128)
    null = network(x, gamma, torch.tensor([4, 4]))
    mixed = network(x, gamma, torch.tensor([1, 4]))
    assert_near(mixed[1:], null[1:])
    assert not torch.allclose(mixed[0], null[0])
    with pytest.raises(ValueError, match=r"^label: this network has 4 classes"):
        network(x, gamma)
    with pytest.raises(ValueError, match=r"^label: this network has no classes"):
        UNet(**SMALL)(x, gamma, torch.tensor([0, 0]))


def test_body_of_embed_is_forward() -> None:
    network = UNet(**SMALL).eval()
    x, gamma = inputs()
    embedding = network.embed(gamma)
    blocks = [block for block in network.modules() if isinstance(block, ResBlock)]
    assert embedding.shape == (2, sum(block.emb_layers[1].out_features for block in blocks))
    assert torch.equal(network.body(x, embedding), network(x, gamma))
    for block in blocks:  # the loop of a sampler has nothing to embed
        block.emb_layers = nn.Identity()
    network.body(x, embedding)


def test_seeded_dropout_does_not_depend_on_the_batch() -> None:
    network = UNet(**SMALL, dropout=0.5).train()
    x, gamma = inputs()
    seeds = torch.tensor([7, 8])
    both = network(x, gamma, None, seeds)
    assert torch.equal(both, network(x, gamma, None, seeds))
    assert_near(network(x[1:], gamma[1:], None, seeds[1:]).detach(), both[1:].detach())
    assert not torch.allclose(network(x, gamma, None, seeds + 1), both)


@pytest.mark.parametrize("seeded", [True, False])
def test_checkpointing_keeps_the_gradients(seeded: bool) -> None:
    x, gamma = inputs()
    seeds = torch.tensor([1, 2]) if seeded else None
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        network = UNet(**SMALL, dropout=0.5, checkpoint=checkpoint).train()
        network(x, gamma, None, seeds).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resblock_updown": False, "checkpoint": True},
        {"attention": "local", "image_size": 24, "attention_resolutions": (12,)},  # pads its maps
    ],
)
def test_compiles_without_a_graph_break(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    network = UNet(**{**SMALL, **options}, dropout=0.1).train()
    x, gamma = inputs()
    seeds = torch.tensor([1, 2])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    y = compiled(x, gamma, None, seeds)
    assert_near(y.detach(), network(x, gamma, None, seeds).detach())
    y.sum().backward()


def test_every_published_layer_kind_without_convolutions() -> None:
    network = UNet(**SMALL, resblock_updown=False, conv_resample=False, heads_upsample=2)
    assert not [key for key in network.state_dict() if ".op." in key or ".1.conv." in key]
    assert network(*inputs()).shape == (2, 3, 16, 16)


def test_heads_on_the_way_up() -> None:
    network = UNet(**{**SMALL, "head_channels": None}, heads=2, heads_upsample=4)
    heads = {k: m.heads for k, m in network.named_modules() if isinstance(m, AttentionBlock)}
    assert heads == {
        "input_blocks.3.1": 2,
        "middle_block.1": 2,
        "output_blocks.0.1": 4,
        "output_blocks.1.1": 4,
    }


def test_the_noise_level_of_the_condition() -> None:
    x, gamma = inputs()
    level = torch.tensor([1.0, 0.6])
    network = UNet(**{**SMALL, "zero_init": True}, condition_level=True).eval()
    plain = UNet(**SMALL).eval()
    missing, extra = plain.load_state_dict(network.state_dict(), strict=False)
    assert not missing
    assert {name.split(".")[0] for name in extra} == {"condition_embed"}
    row = network.embed(gamma, level=level)
    assert torch.equal(row, plain.embed(gamma))  # starts as the network without it
    torch.nn.init.normal_(network.condition_embed[-1].weight)
    assert not torch.allclose(network.embed(gamma, level=level), row)
    row = network.embed(gamma, None, level)
    assert torch.equal(network(x, gamma, level=level), network.body(x, row))
    with pytest.raises(ValueError, match=r"^level: condition_level is True; give it"):
        network(x, gamma)
    with pytest.raises(ValueError, match=r"^level: condition_level is False; leave it out"):
        plain(x, gamma, level=level)


PAPER_SIZE: dict[str, Any] = {
    "image_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "channels": 256,
    "channel_mults": (1, 1, 2, 2, 4, 4),
    "head_channels": 64,
}
ABLATION = {  # table 5 of the paper: parameters in millions, and how near ours are
    "global": (552, 0.002),
    "local": (552, 0.002),
    "resblocks": (603, 0.025),
    "dilated": (624, 0.011),
}


@pytest.mark.parametrize("kind", ABLATION)
def test_the_networks_of_the_papers_ablation_have_its_size(kind: Any) -> None:
    with torch.device("meta"):
        network = UNet(**PAPER_SIZE, attention=kind)
    millions, near = ABLATION[kind]
    found = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert abs(found / millions - 1) < near
    attends = [layer for layer in network.modules() if isinstance(layer, AttentionBlock)]
    assert len(attends) == len(network.attention_layers) == (16 if millions == 552 else 0)
    dilations = [block.in_layers[2].dilation[0] for block in network._res_blocks()]
    spread = [2, 4] * 3 + [2] if kind == "dilated" else []  # of each level down, and the middle
    assert [dilation for dilation in dilations if dilation > 1] == spread


@pytest.mark.parametrize("kind", ["local", "dilated", "resblocks", "none"])
@pytest.mark.parametrize("size", [(16, 16), (21, 13), (1, 3)])
def test_what_stands_for_attention_runs_at_any_size(kind: Any, size: tuple[int, int]) -> None:
    network = UNet(**SMALL, attention=kind).eval()
    x, gamma = inputs(size=size)
    both = network(x, gamma)
    assert both.shape == (2, 3, *size)
    assert_near(network(x[1:], gamma[1:]), both[1:])
    assert torch.equal(network.body(x, network.embed(gamma)), both)


def test_without_attention_nothing_takes_its_place() -> None:
    network = UNet(**SMALL, attention="none")
    assert not any(isinstance(layer, AttentionBlock) for layer in network.modules())
    assert [type(layer) for layer in network.middle_block] == [ResBlock, ResBlock]
    assert network.attention_layers == []


def test_a_window_sees_itself_alone() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 3 * 16, 5, 7)
    found = windowed_attention(qkv, 2, "new", (3, 4))
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            own = qkv[:, :, rows, columns]
            wanted = attention(pad_by_reflection(own, (3, 4)), 2, "new")
            assert_near(
                found[:, :, rows, columns], wanted[:, :, : own.shape[2], : own.shape[3]], 1e-5
            )
    assert_near(windowed_attention(qkv, 2, "new", (9, 9)), attention(qkv, 2, "new"))


def test_dropout_of_the_embedded_noise_level() -> None:
    x, gamma = inputs()
    seeds = torch.tensor([7, 8])
    torch.manual_seed(0)
    network = UNet(**SMALL, dropout=0.5, embedding_dropout=0.1).train()
    plain = UNet(**SMALL, dropout=0.5)
    plain.load_state_dict(network.state_dict())  # it has no weights
    for layer, same in zip(network._res_blocks(), plain._res_blocks(), strict=True):
        assert layer.out_layers[2].layer == same.out_layers[2].layer
    rows = network.embed(gamma, seeds=seeds)
    assert torch.equal(rows, network.embed(gamma, seeds=seeds))
    assert_near(network.embed(gamma[1:], seeds=seeds[1:]), rows[1:])
    assert not torch.allclose(network.embed(gamma, seeds=seeds + 1), rows)
    both = network(x, gamma, None, seeds)
    assert torch.equal(both, network.body(x, rows, seeds))
    assert torch.equal(network.eval().embed(gamma, seeds=seeds), plain.eval().embed(gamma))
