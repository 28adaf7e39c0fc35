"""``accelerate`` on a U-Net after guided-diffusion, written by somebody else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import palette

CHOICES = [
    {"scale_shift": a, "updown": b, "new_order": c, "dropout": 0.2}
    for a, b, c in itertools.product((False, True), repeat=3)
]


@pytest.fixture(params=CHOICES, ids=lambda each: "-".join(k for k, v in each.items() if v))
def network(request, guided, fill) -> nn.Module:
    return fill(guided.UNetModel(**request.param)).eval()


def x_and_t() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 12, 8, generator=generator), torch.tensor([3, 700])


def test_everything_is_replaced_and_the_results_stay(network, close) -> None:
    x, t = x_and_t()
    norms = {name for name, each in network.named_modules() if isinstance(each, nn.GroupNorm)}
    with torch.no_grad():
        before = network(x, t)
        report = palette.accelerate(network)
        assert not report.left
        for norm in norms:
            assert any(f"{norm}.".startswith(f"{path}.") for path in report.replaced), norm
        assert close(network(x, t), before)
        network.to(memory_format=torch.channels_last)
        assert close(network(x.to(memory_format=torch.channels_last), t), before)
        assert palette.accelerate(network) == report
        palette.decelerate(network)
        assert close(network(x, t), before)


def test_the_order_of_the_heads_is_found(guided) -> None:
    for new_order, word in ((True, "new"), (False, "legacy")):
        network = guided.UNetModel(new_order=new_order)
        report = palette.accelerate(network)
        assert f"{word} order" in report.replaced["middle_block.1"]


def test_gradients_stay(network, gradients) -> None:
    network.train()
    before = gradients(network, *x_and_t())
    palette.accelerate(network)
    after = gradients(network, *x_and_t())
    largest = max(value.abs().max() for value in before.values())
    for name, value in before.items():
        assert (after[name] - value).abs().max() <= 2e-5 * largest, name


def test_recomputation_stays(guided, fill, gradients) -> None:
    network = fill(guided.UNetModel(use_checkpoint=True, dropout=0.2)).train()
    before = gradients(network, *x_and_t())
    report = palette.accelerate(network)
    assert not report.left
    after = gradients(network, *x_and_t())
    for name, value in before.items():
        assert (after[name] - value).abs().max() <= 2e-5 * before["input"].abs().max() + 1e-4, name


def test_compiles_in_one_graph(guided, fill, close) -> None:
    network = fill(guided.UNetModel()).eval()
    x, t = x_and_t()
    palette.accelerate(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(x, t), network(x, t))


def test_autocast_is_no_worse_than_before(network) -> None:
    x, t = x_and_t()
    with torch.no_grad():
        exact = network(x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = network(x, t)
            palette.accelerate(network)
            after = network(x, t)
    assert after.dtype == before.dtype
    assert (after - exact).square().mean() <= 1.2 * (before - exact).square().mean()


def test_convolutions_in_half_precision_beside_norms_in_full(guided, fill) -> None:
    """As guided-diffusion's convert_to_fp16 leaves a network; GroupNorm32 is for that."""
    network = fill(guided.UNetModel()).eval()
    x, t = x_and_t()
    with torch.no_grad():
        exact = network(x, t)
        for layer in network.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                layer.bfloat16()
        before = network(x.bfloat16(), t)
        assert not palette.accelerate(network).left
        after = network(x.bfloat16(), t)
    assert after.dtype == before.dtype
    assert (after - exact).square().mean() <= 1.2 * (before - exact).square().mean()


def test_a_block_with_another_activation_stays(guided, close) -> None:
    block = guided.ResBlock(8, 4, 0.0, 16, True, activation=nn.GELU)
    report = palette.accelerate(block)
    assert report.replaced == {}
    assert "begins with GroupNorm32 and GELU" in report.left[""]


def test_a_block_that_computes_something_else_stays(guided, fill, close) -> None:
    class Doubled(guided.ResBlock):
        def _forward(self, x, emb):
            return super()._forward(x, 2 * emb)

    class Noisy(guided.ResBlock):
        def _forward(self, x, emb):
            return super()._forward(x, emb) * (0.5 if self.training else 1)

    class Peeking(guided.AttentionBlock):
        def _forward(self, x):
            return super()._forward(x.flip(-1)).flip(-1) + x.mean()

    for block in (
        Doubled(8, 4, 0.0, 8, True),
        Noisy(8, 4, 0.0, 8, True),
        Peeking(8, 2, True, False),
    ):
        report = palette.accelerate(block)
        assert "computes something else" in report.left[""]
        assert "" not in report.replaced


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "AssertionError"),
        (NotImplementedError(""), "NotImplementedError"),
        (RuntimeError("odd width\nand more"), "RuntimeError: odd width"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_block_that_fails_its_trial_stays(guided, error, reason) -> None:
    class Picky(guided.ResBlock):
        def _forward(self, x, emb):
            if x.shape[-1] % 8:
                raise error
            return super()._forward(x, emb)

    network = nn.ModuleList([Picky(8, 4, 0.0, 8, True), guided.ResBlock(8, 4, 0.0, 8, True)])
    report = palette.accelerate(network)
    assert report.left["0"] == f"Picky: it could not be tried out: {reason}"
    assert "1" in report.replaced


def test_a_block_that_answers_with_more_than_a_tensor_stays(guided) -> None:
    class Telling(guided.ResBlock):
        def _forward(self, x, emb):
            return super()._forward(x, emb), emb

    report = palette.accelerate(Telling(8, 4, 0.0, 8, True))
    assert "could not be tried out: AttributeError" in report.left[""]


def test_attention_of_another_order_stays(guided, fill) -> None:
    class Reversed(guided.QKVAttentionLegacy):
        def split(self, qkv):
            q, k, v = super().split(qkv)
            return v, k, q

    block = guided.AttentionBlock(8, 2, False, False)
    block.attention = Reversed(2)
    report = palette.accelerate(block)
    assert report.replaced == {}
    assert set(report.left) == {"", "attention"}


def test_qkv_attention_by_itself(guided, close) -> None:
    for kind in (guided.QKVAttention, guided.QKVAttentionLegacy):
        layer = kind(3)
        qkv = torch.randn(2, 36, 10)
        before = layer(qkv)
        assert "QKVAttention" in palette.accelerate(layer).replaced[""]
        assert close(layer(qkv), before)


def test_the_published_layout_without_recomputation_method(guided, fill, close) -> None:
    """Descendants that compute in ``forward`` itself."""

    class Plain(guided.ResBlock):
        forward = guided.ResBlock._forward
        _forward = None

    block = fill(Plain(8, 4, 0.0, 16, True, factor=2))
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    before = block(x, emb)
    assert palette.accelerate(block).left == {}
    assert close(block(x, emb), before)


def test_hooks_inside_a_block_see_what_they_saw(guided, fill, close) -> None:
    names = ("out_layers.0", "out_layers.1", "in_layers", "in_layers.1", "emb_layers")
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)

    def seen(block: nn.Module) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        for name in names:
            block.get_submodule(name).register_forward_hook(
                lambda layer, args, output, name=name: outputs.__setitem__(name, output)
            )
        block(x, emb)
        return outputs

    before = seen(fill(guided.ResBlock(8, 4, 0.0, 8, True)))
    block = fill(guided.ResBlock(8, 4, 0.0, 8, True))
    palette.accelerate(block)
    after = seen(block)
    assert before.keys() == after.keys() == set(names)
    for name in names:
        assert close(after[name], before[name]), name
