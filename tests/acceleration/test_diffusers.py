"""``accelerate`` on diffusers itself: UNet2DModel with several kinds of blocks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import palette

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with palette's [test] extra")
PlainResnetBlock2D = pytest.importorskip("diffusers.models.resnet").ResnetBlock2D
AttnProcessor2_0 = pytest.importorskip("diffusers.models.attention_processor").AttnProcessor2_0

KINDS = {
    "default": {},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "dropout": {"dropout": 0.3, "norm_eps": 1e-3},
    "no attention": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    },
    "resnet resampling": {
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "skip": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "one head": {"attention_head_dim": None, "time_embedding_type": "fourier"},
}


def make(**options) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    ).eval()


def x_and_t() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 700])


@pytest.fixture(params=list(KINDS))
def unet(request, fill) -> nn.Module:
    return fill(make(**KINDS[request.param]))


def count(report, kind: str) -> int:
    return sum(what.startswith(kind) for what in report.replaced.values())


def modules_of(network: nn.Module, kind: str) -> int:
    return sum(type(each).__name__ == kind for each in network.modules())


def test_everything_is_replaced_and_the_results_stay(unet, close) -> None:
    x, t = x_and_t()
    with torch.no_grad():
        before = unet(x, t).sample
        report = palette.accelerate(unet)
        assert count(report, "ResnetBlock2D") == modules_of(unet, "ResnetBlock2D") > 0
        assert count(report, "Attention") == modules_of(unet, "Attention")
        assert "conv_norm_out" in report.replaced
        assert not report.left
        assert close(unet(x, t).sample, before)
        channels_last = unet.to(memory_format=torch.channels_last)
        assert close(channels_last(x.to(memory_format=torch.channels_last), t).sample, before)


def test_gradients_stay(unet, close, gradients) -> None:
    unet.train()
    before = gradients(unet, *x_and_t())
    palette.accelerate(unet)
    after = gradients(unet, *x_and_t())
    assert after.keys() == before.keys()
    largest = max(value.abs().max() for value in before.values())
    for name, value in before.items():
        assert (after[name] - value).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("kind", ["default", "scale_shift", "skip"])
def test_compiles_in_one_graph_and_trains_compiled(kind, gradients) -> None:
    unet = make(**KINDS[kind]).train()
    palette.accelerate(unet)
    expected = gradients(unet, *x_and_t())
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, *x_and_t())
    largest = max(value.abs().max() for value in expected.values())
    for name, value in found.items():
        assert (value - expected[name.removeprefix("_orig_mod.")]).abs().max() <= 1e-5 * largest


def test_skip_blocks_have_their_norm_beside_the_activation_fused(fill) -> None:
    report = palette.accelerate(fill(make(**KINDS["skip"])))
    assert {"up_blocks.0.skip_norm", "conv_norm_out"} <= report.replaced.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_before(fill, dtype) -> None:
    unet = fill(make(**KINDS["scale_shift"]))
    x, t = x_and_t()
    with torch.no_grad():
        exact = unet(x, t).sample
        half = copy.deepcopy(unet).to(dtype)
        before = half(x.to(dtype), t).sample
        palette.accelerate(half)
        after = half(x.to(dtype), t).sample
    assert after.dtype == dtype
    assert (after - exact).square().mean() <= 1.2 * (before - exact).square().mean()


def test_autocast_is_no_worse_than_before(fill) -> None:
    unet = fill(make())
    x, t = x_and_t()
    with torch.no_grad():
        exact = unet(x, t).sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = unet(x, t).sample
            palette.accelerate(unet)
            after = unet(x, t).sample
    assert after.dtype == before.dtype
    assert (after - exact).square().mean() <= 1.2 * (before - exact).square().mean()


def test_training_under_autocast(fill, gradients) -> None:
    unet = fill(make(**KINDS["scale_shift"])).train()
    exact = gradients(unet, *x_and_t())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = gradients(unet, *x_and_t())
        palette.accelerate(unet)
        after = gradients(unet, *x_and_t())
    wrong = {
        when: sum(float((g - exact[name]).square().sum()) for name, g in found.items())
        for when, found in (("before", before), ("after", after))
    }
    assert wrong["after"] <= 1.2 * wrong["before"]


def test_undone_exactly(unet) -> None:
    x, t = x_and_t()
    state = list(unet.state_dict())
    kinds = {name: type(part) for name, part in unet.named_modules()}
    attributes = {name: set(vars(part)) for name, part in unet.named_modules()}
    text = repr(unet)
    with torch.no_grad():
        before = unet(x, t).sample
        report = palette.accelerate(unet)
        assert list(unet.state_dict()) == state
        assert repr(unet) == text
        assert isinstance(unet, diffusers.UNet2DModel)
        assert set(report.replaced) <= set(palette.decelerate(unet))
        assert torch.equal(unet(x, t).sample, before)
    assert {name: type(part) for name, part in unet.named_modules()} == kinds
    assert {name: set(vars(part)) for name, part in unet.named_modules()} == attributes
    assert palette.decelerate(unet) == []


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_are_accelerated_and_can_be_undone(fill, copied) -> None:
    unet = fill(make())
    x, t = x_and_t()
    with torch.no_grad():
        before = unet(x, t).sample
        report = palette.accelerate(unet)
        after = unet(x, t).sample
        twin = copied(unet)
        assert palette.accelerate(twin) == report
        assert twin.conv_norm_out.fits(x)
        for parameter in unet.parameters():
            parameter.zero_()  # the copy stands on its own feet
        assert torch.equal(twin(x, t).sample, after)
        palette.decelerate(twin)
        assert torch.equal(twin(x, t).sample, before)


def test_saved_and_read_by_diffusers(fill, tmp_path) -> None:
    unet = fill(make())
    x, t = x_and_t()
    palette.accelerate(unet)
    unet.save_pretrained(tmp_path)
    plain = diffusers.UNet2DModel.from_pretrained(tmp_path)
    palette.decelerate(unet)
    with torch.no_grad():
        assert torch.equal(plain(x, t).sample, unet(x, t).sample)


def test_another_activation_stays_and_is_named(fill) -> None:
    unet = fill(make(act_fn="mish"))
    x, t = x_and_t()
    with torch.no_grad():
        before = unet(x, t).sample
        report = palette.accelerate(unet)
        after = unet(x, t).sample
    assert count(report, "ResnetBlock2D") == 0
    left = [why for why in report.left.values() if "activation is Mish" in why]
    assert len(left) == modules_of(unet, "ResnetBlock2D")
    assert (after - before).abs().max() <= 2e-5 * before.abs().max()


def test_a_block_that_computes_something_else_stays() -> None:
    class ResnetBlock2D(PlainResnetBlock2D):
        def forward(self, input_tensor, temb, *args, **kwargs):
            return super().forward(input_tensor, temb) + 0.01 * input_tensor.mean()

    ResnetBlock2D.__module__ = "diffusers.models.resnet"
    block = ResnetBlock2D(in_channels=32, temb_channels=8, groups=8)
    report = palette.accelerate(block)
    assert report.replaced == {}
    assert "computes something else" in report.left[""]
    assert type(block) is ResnetBlock2D


def test_a_block_of_an_unknown_version_stays() -> None:
    block = PlainResnetBlock2D(in_channels=32, temb_channels=8)
    del block.nonlinearity
    report = palette.accelerate(block)
    assert report.replaced == {}
    assert "unknown version" in report.left[""]


def test_blocks_of_other_models(close) -> None:
    """Different groups for the two norms, no time embedding, an upsampling block by itself."""
    block = PlainResnetBlock2D(
        in_channels=24, out_channels=32, temb_channels=None, groups=3, groups_out=8, up=True
    )
    x = torch.randn(2, 24, 5, 7)
    before = block(x, None)
    assert palette.accelerate(block).left == {}
    assert close(block(x, None), before)
    assert close(block(x.expand(2, 24, 5, 7), temb=None), before)


def test_text_to_image_keeps_its_cross_attention(fill, close) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=8,
        attention_head_dim=4,
    ).eval()
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        before = fill(unet)(x, 5, words).sample
        report = palette.accelerate(unet)
        assert close(unet(x, 5, words).sample, before)
    assert count(report, "ResnetBlock2D") == modules_of(unet, "ResnetBlock2D")
    assert "conv_norm_out" in report.replaced
    assert modules_of(unet, "Attention") == sum("Attention" in why for why in report.left.values())


def test_changes_made_afterwards_are_honoured(fill) -> None:
    unet = fill(make())
    x, t = x_and_t()
    calls = []

    class Counting(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    palette.accelerate(unet)
    with torch.no_grad():
        unet(x, t)
        assert not calls
        unet.mid_block.attentions[0].set_processor(Counting())
        unet(x, t)
        assert len(calls) == 1
        block = unet.mid_block.resnets[0]
        without = unet(x, t).sample
        block.time_emb_proj.register_forward_hook(lambda layer, args, output: 0 * output)
        assert not torch.equal(unet(x, t).sample, without)


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
@pytest.mark.parametrize(
    ("owner", "name", "layer", "found"),
    [
        ("", "conv_act", nn.ReLU(), False),
        ("", "conv_norm_out", nn.GroupNorm(4, 32), True),
        ("up_blocks.0", "act", nn.ReLU(), False),
        ("up_blocks.0", "skip_norm", nn.GroupNorm(4, 64), True),
    ],
    ids=["act", "norm", "act of a block", "norm of a block"],
)
def test_a_replaced_half_of_a_pair_is_called(
    fill, close, owner, name, layer, found, compiled
) -> None:
    """Before the next ``accelerate`` and after it, which makes a pair of what is one."""
    unet = fill(make(**KINDS["skip"]))
    x, t = x_and_t()
    plain = copy.deepcopy(unet)
    palette.accelerate(unet)
    run = unet
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(run(x, t).sample, plain(x, t).sample)
        for network in (unet, plain):
            setattr(network.get_submodule(owner), name, copy.deepcopy(layer))
        expected = plain(x, t).sample
        assert close(run(x, t).sample, expected)
        norm = {"act": "skip_norm", "conv_act": "conv_norm_out"}.get(name, name)
        report = palette.accelerate(unet)
        assert (f"{owner}.{norm}".strip(".") in report.replaced) == found
        assert close(run(x, t).sample, expected)


def test_a_pair_taken_out_of_its_owner_is_what_it_was(fill, close) -> None:
    unet = fill(make())
    norm, plain, x = unet.conv_norm_out, copy.deepcopy(unet.conv_norm_out), torch.randn(1, 32, 3, 5)
    palette.accelerate(unet)
    twin = copy.deepcopy(norm)
    del unet
    gc.collect()
    for each in (norm, twin, copy.deepcopy(norm), pickle.loads(pickle.dumps(twin))):
        assert close(each(x), plain(x))


def test_an_accelerated_network_is_freed_at_once() -> None:
    """It may be gigabytes on a GPU, which cannot wait for the cycle collector."""
    unet = make()
    palette.accelerate(unet)
    left = weakref.ref(unet)
    gc.disable()
    try:
        del unet
        assert left() is None
    finally:
        gc.enable()


def test_hooks_see_what_they_saw(fill, close) -> None:
    """On layers that the ops do the work of, and put there before or after."""
    watched = ("conv_norm_out", "conv_act", "mid_block.resnets.0.norm2", "mid_block.resnets.0")
    x, t = x_and_t()

    def seen(unet: nn.Module) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        for name in watched:
            unet.get_submodule(name).register_forward_hook(
                lambda layer, args, output, name=name: outputs.__setitem__(name, output)
            )
        with torch.no_grad():
            unet(x, t)
        return outputs

    before = seen(fill(make()))
    unet = fill(make())
    palette.accelerate(unet)
    after = seen(unet)
    report = palette.accelerate(unet)
    assert report.replaced.keys() >= {"conv_norm_out", "mid_block.resnets.0"}
    for name in watched:
        assert close(after[name], before[name])
    unet = fill(make())
    seen(unet)
    report = palette.accelerate(unet)
    assert "has a hook" in report.left["conv_norm_out"]
    assert "norm2 has a hook" in report.left["mid_block.resnets.0"]
