"""``accelerate`` on sequences and on our own networks; its report; undoing; what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import palette
from palette.models.unet import UNet
from palette.upstream import Network


class Odd(nn.GroupNorm):
    """GroupNorm that computes something else."""

    def forward(self, input):
        return super().forward(input) * 1.01


class Widening(nn.GroupNorm):
    """GroupNorm that gives float32 for half precision."""

    def forward(self, input):
        return super().forward(input.float())


class Sometimes(nn.GroupNorm):
    """GroupNorm with a switch that no check can know."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.twice = False

    def forward(self, input):
        return super().forward(super().forward(input) if self.twice else input)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3)],
        lambda: [nn.GroupNorm(8, 8, eps=0.3), nn.SiLU(inplace=True)],
        lambda: [nn.GroupNorm(1, 8, affine=False), nn.SiLU(), nn.Dropout(0.5)],
        lambda: [nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(4, 8), nn.SiLU()],
    ],
    ids=["plain", "eps", "no weights", "two pairs"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sequences(layers, dtype, fill, close, gradients) -> None:
    network = fill(nn.Sequential(*layers())).to(dtype)
    x = torch.randn(3, 8, 5, 7, dtype=dtype)
    before = gradients(network, x)
    report = palette.accelerate(network)
    assert list(report.replaced) == [""]
    assert not report.left
    after = gradients(network, x)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)
    assert palette.decelerate(network) == [""]
    assert type(network) is nn.Sequential
    assert network.state_dict().keys() == nn.Sequential(*layers()).state_dict().keys()


def test_sequence_compiles_in_one_graph(close) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(2, 3, 4, 4)
    before = network(x)
    palette.accelerate(network)
    torch._dynamo.reset()
    assert close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), before)


def test_compiled_before_it_was_accelerated(close) -> None:
    network = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(2, 8, 4, 4)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(network, backend=keep)
    before = compiled(x)
    assert "" not in palette.accelerate(compiled).replaced
    assert close(compiled(x), before)
    assert "palette" in graphs[-1]
    assert "palette" not in graphs[0]
    palette.decelerate(compiled)
    assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("norm", [Odd, Widening, Sometimes])
def test_norms_that_do_something_else_stay(norm) -> None:
    network = nn.Sequential(norm(2, 8), nn.SiLU())
    x = torch.randn(1, 8, 4, 4)
    before = network(x)
    report = palette.accelerate(network)
    assert report.replaced == {}
    assert norm.__name__ in report.left["0"]
    assert torch.equal(network(x), before)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Identity])
def test_other_activations_stay(activation) -> None:
    network = nn.Sequential(nn.GroupNorm(2, 8), activation())
    assert palette.accelerate(network).replaced == {}
    assert type(network) is nn.Sequential


def test_a_norm_without_a_known_activation_stays() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()

    report = palette.accelerate(Block())
    assert report.replaced == {}
    assert "no SiLU is known" in report.left["norm"]


def test_unknown_attention_is_named() -> None:
    report = palette.accelerate(nn.ModuleList([nn.MultiheadAttention(8, 2)]))
    assert "MultiheadAttention: an unknown kind" in report.left["0"]


def test_a_subclass_of_sequential_stays() -> None:
    class Branching(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    network = Branching(nn.GroupNorm(2, 8), nn.SiLU())
    assert palette.accelerate(network).replaced == {}


def test_a_changed_sequence_runs_as_it_is_now(close) -> None:
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))
    palette.accelerate(network)
    x = torch.randn(1, 8, 4, 4)
    for change in (
        lambda: network.insert(0, nn.Conv2d(8, 8, 1)),
        lambda: network.__setitem__(2, nn.ReLU()),
        lambda: network.append(nn.Tanh()),
    ):
        change()
        expected = x
        for layer in network:
            expected = layer(expected)
        assert close(network(x), expected)
    del network[1]
    assert close(network[:2](x), network[1](network[0](x)))


def test_a_replaced_forward_inside_is_called() -> None:
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    palette.accelerate(network)
    network[1].forward = torch.zeros_like
    assert network(torch.randn(1, 8, 4, 4)).abs().sum() == 0
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    network.forward = torch.zeros_like
    report = palette.accelerate(network)
    assert "forward has been replaced" in report.left[""]


@pytest.mark.parametrize(
    ("behind", "fuses"),
    [
        ([], False),
        ([nn.Dropout(0.0)], False),
        ([nn.Identity(), nn.AvgPool2d(2)], False),
        ([nn.Dropout(0.0), nn.Conv2d(8, 4, 1)], True),
        ([nn.Linear(4, 2)], True),
    ],
    ids=["nothing", "dropout", "pooling", "convolution", "linear"],
)
def test_the_last_pair_keeps_its_dtype_under_autocast(behind, fuses) -> None:
    """Which a GPU's GroupNorm widens: only what is cast in any case may follow the op."""
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), *behind)
    x = torch.randn(1, 8, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(x)
        palette.accelerate(network)
        assert network.fits(x) == fuses
        assert network(x).dtype == before.dtype
        assert fuses or torch.equal(network(x), before)
    assert network.fits(x)


def test_shared_layers(close) -> None:
    """One norm in two places, and one sequence in two places."""
    norm = nn.GroupNorm(2, 8)
    shared = nn.Sequential(norm, nn.SiLU())
    network = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(norm, nn.ReLU())})
    x = torch.randn(1, 8, 4, 4)
    before = {name: part(x) for name, part in network.items()}
    assert list(palette.accelerate(network).replaced) == ["a"]
    for name, part in network.items():
        assert close(part(x), before[name])


def test_our_networks_have_nothing_to_replace() -> None:
    network = UNet(image_size=16, in_channels=6, out_channels=3, channels=32, channel_mults=(1, 2))
    published = Network(
        unet={
            "image_size": 16,
            "in_channel": 6,
            "out_channel": 3,
            "inner_channel": 32,
            "channel_mults": [1, 2],
            "res_blocks": 1,
            "attn_res": [2],
        },
        beta_schedule={"train": {"schedule": "linear", "n_timestep": 10}},
    )
    for ours in (network, published):
        report = palette.accelerate(ours)
        assert report.replaced == {}
        assert report.left == {}
        assert len(report.own) > 10
        assert str(report).startswith("replaced: nothing\nleft as it is: nothing\nalready made")


def test_report_names_paths_and_reasons() -> None:
    network = nn.ModuleDict(
        {
            "good": nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()),
            "better": nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()),
            "bad": nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()),
        }
    )
    assert str(palette.accelerate(network)).splitlines() == [
        "replaced: 2",
        "  2 x GroupNorm + SiLU (good, ...)",
        "left as it is: 1",
        "  1 x GroupNorm: no SiLU is known to follow it (bad.0)",
    ]


def test_called_again_it_finds_what_is_new() -> None:
    network = nn.ModuleList([nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())])
    first = palette.accelerate(network)
    assert palette.accelerate(network) == first
    network.append(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    assert list(palette.accelerate(network).replaced) == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda network: network.__delitem__(1), None),
        (lambda network: network.insert(0, nn.Conv2d(8, 8, 1)), {"1", "2"}),
        (lambda network: network.__setitem__(0, nn.GroupNorm(4, 8)), {"0", "1"}),
        (lambda network: network.__setitem__(1, nn.ReLU()), None),
        (lambda network: network.extend([nn.GroupNorm(4, 8), nn.SiLU()]), {"0", "1", "2", "3"}),
    ],
    ids=["shorter", "moved", "another norm", "another activation", "longer"],
)
def test_called_again_it_finds_what_a_sequence_has_become(change, parts, close) -> None:
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    palette.accelerate(network)
    change(network)
    expected = x = torch.randn(1, 8, 4, 4)
    for layer in network:
        expected = layer(expected)
    report = palette.accelerate(network)
    assert ("" in report.replaced) == (parts is not None)
    assert set(getattr(network, "_palette_parts", ())) == (parts or set())
    assert close(network(x), expected)


def test_called_again_it_finds_a_slice() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    palette.accelerate(network)
    assert list(palette.accelerate(network[1:]).replaced) == [""]
    assert palette.accelerate(network[:2]).left.keys() == {"1"}


def test_called_again_it_leaves_what_has_changed_under_another_class() -> None:
    network = nn.ModuleList([nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())])
    palette.accelerate(network)
    inner = network[0]
    inner.__class__ = type("Sharded", (type(inner),), {})
    assert list(palette.accelerate(network).replaced) == ["0"]
    del inner[1]
    report = palette.accelerate(network)
    assert report.replaced == {}
    assert "made a Sharded" in report.left["0"]


@pytest.mark.parametrize(
    ("default", "begun", "ended"),
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_device, "meta", None),
    ],
    ids=["dtype", "device"],
)
def test_defaults_for_new_tensors_change_nothing(default, begun, ended, guided) -> None:
    """As in a script that begins with ``torch.set_default_device("cuda")``."""

    def make() -> nn.Module:
        return nn.ModuleList(
            [
                nn.Sequential(guided.GroupNorm32(2, 8), guided.SiLU(), nn.Conv2d(8, 8, 1)),
                guided.ResBlock(8, 4, 0.0, 8, True),
                guided.QKVAttention(2),
            ]
        )

    expected, network = palette.accelerate(make()), make()
    default(begun)
    try:
        assert palette.accelerate(network) == expected
    finally:
        default(ended)
    assert not expected.left


def test_the_random_state_and_the_hooks_are_left_in_peace() -> None:
    calls = []
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(), nn.Conv2d(8, 8, 1))
    network[3].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    palette.accelerate(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    network(torch.randn(1, 8, 2, 2))
    assert calls == [1]


def test_data_parallel_replicas_use_their_own_parameters() -> None:
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    palette.accelerate(network)
    replica = network._replicate_for_data_parallel()
    assert type(replica) is type(network)
    assert "forward" not in vars(replica)


def test_undo_in_copies(close) -> None:
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))
    palette.accelerate(network)
    for twin in (copy.deepcopy(network), copy.copy(network), pickle.loads(pickle.dumps(network))):
        assert palette.decelerate(twin) == [""]
        assert type(twin) is nn.Sequential
        assert "_palette_swap" not in vars(twin)
    assert type(network) is not nn.Sequential


def test_refuses_to_undo_under_another_class() -> None:
    network = nn.ModuleList([nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())])
    palette.accelerate(network)
    inner = network[0]
    fused = type(inner)
    inner.__class__ = type("Sharded", (fused,), {})
    with pytest.raises(ValueError, match="decelerate: '0' has been made a Sharded"):
        palette.decelerate(network)
    inner.__class__ = fused
    assert palette.decelerate(network) == ["0"]


def test_refuses_what_is_no_module() -> None:
    for function in (palette.accelerate, palette.decelerate):
        with pytest.raises(TypeError, match=r"module is str, wanted an nn\.Module"):
            function("unet")


def test_the_name_is_the_function_whatever_was_imported() -> None:
    code = (
        "import palette.acceleration, palette.upstream, palette\n"
        "from palette import accelerate\n"
        "assert callable(palette.accelerate) and palette.accelerate is accelerate\n"
        "import sys\n"
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
