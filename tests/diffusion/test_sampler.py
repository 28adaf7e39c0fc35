"""The step engine: one seed one image, masks, guidance, previews, and what happens in the loop."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from palette import ops
from palette.diffusion.sampler import CancelledError, Sampler
from palette.diffusion.schedule import Schedule, published, spaced
from palette.diffusion.solvers import SOLVERS
from palette.models.unet import UNet

SCHEDULE = Schedule.from_name("linear", 2000, 1e-6, 0.01)
LEVELS = spaced(SCHEDULE, 8)
# from gamma = 0.08 on, where an untrained network's rounding is not yet amplified a hundredfold
CALM = spaced(Schedule.from_name("linear", 100, 1e-4, 0.05), 5)
SEEDS = torch.tensor([7, -1, 2**40 + 3, 0, 12])


def pointwise(x: Tensor, gamma: Tensor, label: Tensor | None = None) -> Tensor:
    """An answer made of element-wise operations: the same bits in any batch."""
    condition, noisy = x.float().split([x.shape[1] - 3, 3], dim=1)
    bias = 0 if label is None else label[:, None, None, None] / 10
    hint = condition.sum(1, keepdim=True)
    return noisy * (1 - gamma)[:, None, None, None].sqrt() + 0.1 * torch.sin(3 * hint + bias)


def make_condition(count: int = 5, channels: int = 2) -> Tensor:
    return torch.randn(count, channels, 6, 4, generator=torch.Generator().manual_seed(3))


def make_hole(count: int = 5) -> tuple[Tensor, Tensor]:
    known = torch.rand(count, 3, 6, 4, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mask = torch.zeros(count, 1, 6, 4)
    mask[:, :, 1:4, 1:3] = 1
    return known, mask


class LabelledNetwork(nn.Module):
    """A network with classes that counts its calls."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, x: Tensor, gamma: Tensor, label: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.weight * pointwise(x, gamma, label)


def make_unet(**options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(
        image_size=8,
        in_channels=6,
        out_channels=3,
        channels=32,
        channel_mults=(1, 2),
        res_blocks=1,
        attention_resolutions=(),
        zero_init=False,
        **options,
    ).eval()


@pytest.mark.parametrize(("solver", "eta"), [*((name, 0.0) for name in SOLVERS), ("ddim", 0.7)])
def test_a_seed_gives_the_same_image_alone_and_in_any_batch(solver: str, eta: float) -> None:
    sampler = Sampler(pointwise, LEVELS, solver=solver, eta=eta)
    condition, (known, mask) = make_condition(), make_hole()
    arguments = {"seeds": SEEDS, "known": known, "mask": mask}
    together = sampler.sample(condition, **arguments)
    for order in (torch.tensor([3, 0, 4, 2, 1]), *torch.arange(5).split(1)):
        part = sampler.sample(condition[order], **{k: v[order] for k, v in arguments.items()})
        assert torch.equal(part, together[order])
    for batch_size in (1, 2, 5, 99):
        split = sampler.sample(condition, **arguments, batch_size=batch_size)
        assert torch.equal(split, together)
    others = sampler.sample(condition, **{**arguments, "seeds": SEEDS + 1})
    assert (others != together).any(dim=1).sum() == 5 * 3 * 2


def test_a_real_network_gives_one_image_to_rounding() -> None:
    sampler = Sampler(make_unet(), CALM)
    condition = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    together = sampler.sample(condition, seeds=[4, 5, 6])
    for i in range(3):
        alone = sampler.sample(condition[i : i + 1], seeds=[4 + i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    split = sampler.sample(condition, seeds=[4, 5, 6], batch_size=2)
    torch.testing.assert_close(split, together, rtol=0, atol=1e-5)


def test_seeds_are_64_bit_integers() -> None:
    sampler, condition = Sampler(pointwise, LEVELS), make_condition(2)
    large = sampler.sample(condition, seeds=[2**64 - 1, 2**63])
    assert torch.equal(large, sampler.sample(condition, seeds=torch.tensor([-1, -(2**63)])))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_walk_is_the_table_by_hand(solver: str) -> None:
    sampler = Sampler(pointwise, LEVELS, solver=solver)
    condition, (known, mask) = make_condition(), make_hole()
    result = sampler.sample(condition, seeds=SEEDS, known=known, mask=mask)
    y = known * (1 - mask) + mask * ops.noise(SEEDS, 0, (3, 6, 4))
    before = torch.zeros_like(y)
    older = torch.zeros_like(y)
    for i, row in enumerate(sampler.table.astype(np.float32).tolist()):
        a, b, c1, c2, c3, sigma, *two_ago = row
        gamma = torch.full((5,), LEVELS[i], dtype=torch.float32)
        x0 = (a * y + b * pointwise(torch.cat((condition, y), 1), gamma)).clamp(-1, 1)
        look_back = before + sum(two_ago) * older
        y = c1 * x0 + c2 * y + c3 * look_back + sigma * ops.noise(SEEDS, i + 1, (3, 6, 4))
        y, before, older = known * (1 - mask) + mask * y, x0, before
    torch.testing.assert_close(result, y, rtol=0, atol=1e-4)
    assert result.is_contiguous()
    assert result.dtype == torch.float32


def test_known_pixels_stay_and_the_network_always_sees_them_clean() -> None:
    known, mask = make_hole()
    outside = (mask == 0).expand(-1, 3, -1, -1)
    inputs: list[Tensor] = []

    def network(x: Tensor, gamma: Tensor) -> Tensor:
        inputs.append(x.clone())
        return pointwise(x, gamma)

    sampler = Sampler(network, LEVELS)
    result = sampler.sample(make_condition(), seeds=SEEDS, known=known, mask=mask)
    assert torch.equal(result[outside], known[outside])
    assert len(inputs) == 8
    for x in inputs:
        assert torch.equal(x[:, :2], make_condition())
        assert torch.equal(x[:, 2:][outside], known[outside])


def test_gammas_are_the_levels_in_order() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, gamma: Tensor) -> Tensor:
        seen.append(gamma.clone())
        return pointwise(x, gamma)

    levels = published(Schedule.from_name("linear", 9, 1e-4, 0.5))
    Sampler(network, levels, solver="ddpm").sample(make_condition(), seeds=SEEDS)
    wanted = torch.from_numpy(levels[:-1].astype(np.float32))
    assert torch.equal(torch.stack(seen), wanted[:, None].expand(9, 5))


def test_given_noises_replace_the_drawn_ones() -> None:
    sampler = Sampler(pointwise, LEVELS, solver="ddpm")
    shape = (3, 6, 4)
    drawn = sampler.sample(make_condition(), seeds=SEEDS)
    noises = [ops.noise(SEEDS, step, shape) for step in range(9)]
    given = {"initial": noises[0], "seeds": [0] * 5}
    for rest in (noises[1:8], noises[1:], torch.stack(noises[1:])):
        assert torch.equal(sampler.sample(make_condition(), noises=rest, **given), drawn)
    split = sampler.sample(make_condition(), noises=noises[1:8], batch_size=2, **given)
    assert torch.equal(split, drawn)
    with pytest.raises(ValueError, match="noises has 6 entries, expected 7"):
        sampler.sample(make_condition(), noises=noises[1:7], **given)


def test_unconditional_sampling() -> None:
    sampler = Sampler(lambda x, gamma: 0.5 * x, LEVELS)
    result = sampler.sample(torch.empty(2, 0, 5, 7), seeds=[1, 2], channels=1)
    assert result.shape == (2, 1, 5, 7)
    assert sampler.sample(torch.empty(0, 0, 5, 7), seeds=[], channels=1).shape == (0, 1, 5, 7)


def test_guidance_mixes_the_labelled_and_the_unlabelled_answer() -> None:
    network = LabelledNetwork()
    label = torch.arange(5)
    options = {"seeds": SEEDS, "label": label}
    plain = Sampler(network, LEVELS).sample(make_condition(), **options)
    assert len(network.modes) == 8
    without = Sampler(network, LEVELS, guidance=0.0).sample(make_condition(), **options)
    null = {**options, "label": torch.full((5,), 10)}
    assert torch.equal(without, Sampler(network, LEVELS).sample(make_condition(), **null))

    class Guided(LabelledNetwork):
        def forward(self, x: Tensor, gamma: Tensor, label: Tensor) -> Tensor:
            far, near = pointwise(x, gamma, torch.full_like(label, 10)), pointwise(x, gamma, label)
            return far + 3.0 * (near - far)

    guided = Sampler(network, LEVELS, guidance=3.0).sample(make_condition(), **options)
    wanted = Sampler(Guided(), LEVELS).sample(make_condition(), **options)
    torch.testing.assert_close(guided, wanted, rtol=0, atol=1e-5)
    assert (guided - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"guidance is 3.0, expected 1 without labels"):
        Sampler(network, LEVELS, guidance=3.0).sample(make_condition(), seeds=SEEDS)


@pytest.mark.parametrize(("num_classes", "guidance"), [(None, 1.0), (4, 1.0), (4, 2.0)])
def test_precomputed_embeddings_change_nothing(num_classes: int | None, guidance: float) -> None:
    network = make_unet(num_classes=num_classes)

    class Plain(nn.Module):
        """The same network without ``embed`` and ``body``."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.num_classes = network, num_classes

        def forward(self, x: Tensor, gamma: Tensor, label: Tensor | None = None) -> Tensor:
            out: Tensor = self.inner(x, gamma, label)
            return out

    calls: list[int] = []
    network.cond_embed.register_forward_hook(lambda *arguments: calls.append(1))
    condition = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    label = None if num_classes is None else torch.tensor([2, 0, 3])
    options = {"seeds": [1, 2, 3], "label": label}
    ahead = Sampler(network, CALM, solver="ddim", guidance=guidance).sample(condition, **options)
    # once, or once for each class of the batch, and once for no class
    assert len(calls) == (1 if label is None else 3) + (guidance != 1.0)
    plain = Sampler(Plain(), CALM, solver="ddim", guidance=guidance).sample(condition, **options)
    assert len(calls) > 5
    torch.testing.assert_close(ahead, plain, rtol=0, atol=1e-5)


def test_a_compiled_network_is_called_whole() -> None:
    class Compiled(LabelledNetwork):
        """As ``torch.compile`` shows itself: the names of the module inside, not compiled."""

        _orig_mod = embed = body = None

    network = Compiled()
    Sampler(network, LEVELS).sample(make_condition(), seeds=SEEDS, label=torch.arange(5))
    assert len(network.modes) == 8


@pytest.mark.parametrize("solver", SOLVERS)
def test_previews_show_x0_or_the_state_and_change_nothing(solver: str) -> None:
    sampler = Sampler(pointwise, LEVELS, solver=solver)
    quiet = sampler.sample(make_condition(), seeds=SEEDS)
    shown: dict[str, list[tuple[int, Tensor]]] = {"x0": [], "state": []}
    for preview, frames in shown.items():
        result = sampler.sample(
            make_condition(),
            seeds=SEEDS,
            preview=preview,
            on_step=lambda i, image, frames=frames: frames.append((i, image.clone())),
        )
        assert torch.equal(result, quiet)
        assert [i for i, _ in frames] == list(range(8))
    assert torch.equal(shown["x0"][-1][1], quiet)  # the last step returns x0 itself
    assert torch.equal(shown["state"][-1][1], quiet)
    assert shown["x0"][0][1].abs().max() <= 1
    assert shown["state"][0][1].abs().max() > 1


def test_groups_are_sampled_and_shown_one_after_another() -> None:
    steps: list[tuple[int, int]] = []
    Sampler(pointwise, LEVELS).sample(
        make_condition(),
        seeds=SEEDS,
        batch_size=2,
        on_step=lambda i, image: steps.append((i, len(image))),
    )
    assert steps == [(i, count) for count in (2, 2, 1) for i in range(8)]


def test_sampling_can_be_stopped_and_begun_again() -> None:
    sampler, network = Sampler(pointwise, LEVELS), LabelledNetwork().train()
    whole = sampler.sample(make_condition(), seeds=SEEDS)
    with pytest.raises(CancelledError, match="step 3 of 8"):
        sampler.sample(make_condition(), seeds=SEEDS, on_step=lambda i, image: i < 2)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(make_condition(), seeds=SEEDS, on_step=interrupt)
    assert torch.equal(sampler.sample(make_condition(), seeds=SEEDS), whole)
    with pytest.raises(KeyboardInterrupt):
        Sampler(network, LEVELS).sample(
            make_condition(), seeds=SEEDS, label=torch.arange(5), on_step=interrupt
        )
    assert network.training


def interrupt(i: int, image: Tensor) -> None:
    raise KeyboardInterrupt


def test_the_network_runs_in_evaluation_mode_without_gradients() -> None:
    network = LabelledNetwork().train()
    result = Sampler(network, LEVELS).sample(make_condition(), seeds=SEEDS, label=torch.arange(5))
    assert network.modes == [False] * 8
    assert network.training
    assert not result.requires_grad
    assert not result.is_inference()


@pytest.mark.parametrize("frozen", [False, True])
def test_every_module_gets_its_mode_back(frozen: bool) -> None:
    """Also a frozen part of a network that trains, and one that trains in one that does not.

    ``train`` hears of it: some layers merge weights when they stop training.
    """

    class Merging(nn.Dropout):
        merged = False

        def train(self, mode: bool = True) -> Merging:
            self.merged = not mode
            return super().train(mode)

    class Holding(LabelledNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(Merging())

        def forward(self, x: Tensor, gamma: Tensor, label: Tensor) -> Tensor:
            assert not any(each.training for each in self.modules())
            return super().forward(x, gamma, label)

    network = Holding().train(frozen)
    network.part.train(not frozen)
    modes = [each.training for each in network.modules()]
    Sampler(network, LEVELS).sample(make_condition(), seeds=SEEDS, label=torch.arange(5))
    assert [each.training for each in network.modules()] == modes
    assert network.part[0].merged == frozen


class HostReads(TorchDispatchMode):
    """Records the operations in which the host waits for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "equal")):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_host_reads_nothing_in_the_loop(solver: str) -> None:
    sampler = Sampler(pointwise, LEVELS, solver=solver)
    known, mask = make_hole()
    with HostReads() as mode:
        sampler.sample(make_condition(), seeds=SEEDS, known=known, mask=mask)
    assert not mode.reads


def test_buffers_are_kept_per_shape_and_channels_last() -> None:
    addresses: list[int] = []

    def network(x: Tensor, gamma: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last)
        addresses.append(x.data_ptr())
        return pointwise(x, gamma)

    sampler = Sampler(network, LEVELS)
    first = sampler.sample(make_condition(), seeds=SEEDS)
    kept = first.clone()
    sampler.sample(make_condition(3), seeds=SEEDS[:3])
    sampler.sample(make_condition(), seeds=SEEDS + 1)
    assert torch.equal(first, kept)  # what was returned is not the buffer
    assert len(set(addresses[:8] + addresses[16:])) == 1
    for count in range(1, 9):
        sampler.sample(make_condition(count), seeds=[0] * count)
    assert len(sampler._kept) == 4


def test_half_precision_network_keeps_a_float32_state() -> None:
    dtypes: set[torch.dtype] = set()

    def network(x: Tensor, gamma: Tensor) -> Tensor:
        dtypes.update((x.dtype, gamma.dtype))
        return pointwise(x, gamma).to(x.dtype)

    exact = Sampler(pointwise, LEVELS).sample(make_condition(), seeds=SEEDS)
    half = Sampler(network, LEVELS, dtype=torch.bfloat16).sample(make_condition(), seeds=SEEDS)
    assert dtypes == {torch.bfloat16, torch.float32}
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1


@pytest.mark.parametrize("convert", [True, False])
def test_bfloat16_with_converted_weights_or_under_autocast(convert: bool) -> None:
    network = make_unet()
    condition = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    exact = Sampler(network, CALM).sample(condition, seeds=[1, 2])
    outputs: set[torch.dtype] = set()
    network.out.register_forward_hook(lambda *arguments: outputs.add(arguments[-1].dtype))
    if convert:
        network = network.to(torch.bfloat16)
    sampler = Sampler(network, CALM, dtype=torch.bfloat16)
    half = sampler.sample(condition, seeds=[1, 2])
    assert outputs == {torch.bfloat16}
    assert (half - exact).abs().mean() < 0.05


@pytest.mark.parametrize(("here", "progress"), [(True, True), (False, True), (True, False)])
def test_bar_on_a_terminal_only(
    here: bool, progress: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: here, raising=False)
    sampler = Sampler(pointwise, LEVELS)
    sampler.sample(make_condition(), seeds=SEEDS, batch_size=3, progress=progress)
    text = capsys.readouterr().err
    assert ("16/16" in text) == (here and progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, r"shape \[1\], expected int64 \[5\]"),
        ({"seeds": torch.zeros(5)}, r"seeds is torch.float32"),
        ({"known": torch.zeros(5, 3, 6, 4)}, "known and mask belong together"),
        ({"label": torch.zeros(4, dtype=torch.int64)}, r"label has shape \[4\], expected \[5\]"),
        ({"initial": torch.zeros(5, 2, 6, 4)}, r"initial has shape \[5, 2, 6, 4\], expected"),
        (
            {"known": torch.zeros(5, 3, 6, 4), "mask": torch.zeros(5, 3, 6, 4)},
            r"mask has shape \[5, 3, 6, 4\], expected \[5, 1, 6, 4\]",
        ),
        ({"condition": torch.zeros(5, 6, 4)}, "condition has shape"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"condition": make_condition(), "seeds": SEEDS, **change}
    with pytest.raises(ValueError, match=message):
        Sampler(pointwise, LEVELS).sample(**arguments)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_regression_is_one_evaluation_from_zeros(solver: str) -> None:
    condition, (known, mask) = make_condition(), make_hole()
    asked: list[Tensor] = []

    def network(x: Tensor, gamma: Tensor) -> Tensor:
        asked.append(x.clone())
        return pointwise(x, gamma)

    sampler = Sampler(network, spaced(SCHEDULE, 1), solver=solver, prediction="regression")
    drawn = sampler.sample(condition, seeds=SEEDS, known=known, mask=mask)
    assert len(asked) == 1
    assert torch.equal(asked[0][:, 2:], known * (1 - mask))
    gamma = torch.full((5,), SCHEDULE.range[0])
    answer = pointwise(asked[0], gamma).clamp(-1, 1)
    torch.testing.assert_close(drawn, known * (1 - mask) + mask * answer)
    assert torch.equal(sampler.sample(condition, seeds=SEEDS + 1, known=known, mask=mask), drawn)
    with pytest.raises(ValueError, match="expected 2 for a regression"):
        Sampler(network, LEVELS, prediction="regression")


def test_images_of_different_condition_levels_are_the_same_alone_and_together() -> None:
    network = make_unet(num_classes=3, condition_level=True)
    torch.nn.init.normal_(network.condition_embed[-1].weight)
    sampler = Sampler(network, CALM)
    condition = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    label, level = torch.tensor([2, 0, 2]), torch.tensor([1.0, 0.7, 0.7])
    together = sampler.sample(condition, seeds=[1, 2, 3], label=label, level=level)
    for i in range(3):
        one = slice(i, i + 1)
        options = {"seeds": [i + 1], "label": label[one], "level": level[one]}
        alone = sampler.sample(condition[one], **options)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    other = sampler.sample(condition, seeds=[1, 2, 3], label=label, level=level.flip(0))
    assert not torch.allclose(other[0], together[0], atol=1e-3)
    with pytest.raises(ValueError, match=r"level has shape \[2\], expected \[3\]"):
        sampler.sample(condition, seeds=[1, 2, 3], label=label, level=level[:2])
