"""Clipping, AdamW, averages and rounding in one pass: what PyTorch does in four."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.profiler import profile

from palette.config import Train
from palette.training.ema import EMA, Further
from palette.training.mixed_precision import MixedPrecision
from palette.training.optimizer import adam, trained
from palette.training.update import OnePass, Update


class Run:
    """A small network, one of its layers frozen and one without gradients, and its update."""

    def __init__(self, train: Train, *, one_pass: bool, copies: bool = False) -> None:
        torch.manual_seed(0)
        self.network = nn.ModuleDict(
            {
                "conv": nn.Conv2d(4, 8, 3, padding=1),
                "frozen": nn.Conv2d(8, 8, 1),
                "last": nn.Conv2d(8, 4, 1),
                "unused": nn.Linear(2, 2),
            }
        ).to(memory_format=torch.channels_last)
        self.network["frozen"].requires_grad_(False)
        self.ema = EMA(self.network, train.ema_decay)
        self.further = Further(self.network, train)
        with torch.no_grad():  # as a run that is begun from other weights than its average's
            self.network["frozen"].weight.add_(1)
        dtype = torch.bfloat16 if copies else torch.float32
        self.mixed = MixedPrecision(self.network, dtype, half_gradients=one_pass)
        self.optimizer = adam(trained(self.network, train), train)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        kind = OnePass if one_pass else Update
        followers = (self.optimizer, scaler, self.ema, self.further, self.mixed)
        self.update = kind(train, self.network, *followers)

    def step(self, number: int, loss: float = 1.0, *, poison: bool = False) -> float:
        g = torch.Generator().manual_seed(number)
        x = torch.randn(2, 4, 8, 8, generator=g)
        self.mixed.refresh()
        for name in ("conv", "frozen", "last"):
            x = self.mixed.network[name](x)
        (x.float().square().mean() * (float("nan") if poison else 1.0)).backward()
        return self.update.apply(loss, number)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Weights, averages and moments."""
        yield from self.network.state_dict().values()
        yield from self.ema.network.state_dict().values()
        for average in self.further.networks():
            yield from average.state_dict().values()
        for slot in self.optimizer.state.values():
            yield from slot.values()


TRAIN = Train(
    lr=0.01, weight_decay=0.1, clip=0.5, ema_start=1, ema_every=2, ema_decays=[0.5], swa_start=3
)


@pytest.mark.parametrize("copies", [False, True])
def test_as_pytorch_does_it(copies: bool) -> None:
    ours, theirs = (Run(TRAIN, one_pass=one, copies=copies) for one in (True, False))
    for number in range(6):
        assert ours.step(number) == pytest.approx(theirs.step(number), rel=1e-4)
        assert all(weight.grad is None for weight in ours.network.parameters())
        for weight, copied in ours.mixed.copies().items():
            assert torch.equal(copied, weight.bfloat16())
    assert ours.ema.updates == theirs.ema.updates == 3
    assert ours.further.updates() == theirs.further.updates()
    assert len(list(ours.tensors())) == len(list(theirs.tensors()))
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    frozen = ours.ema.network["frozen"].weight - ours.network["frozen"].weight
    assert 0 < frozen.abs().max() < 1  # averages of what is not trained go on, too


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(one_pass: bool) -> None:
    run = Run(TRAIN, one_pass=one_pass, copies=True)
    for number in range(3):
        run.step(number)
    before = [each.clone() for each in run.tensors()]
    run.step(3, loss=float("nan"))
    assert run.step(3, poison=True) != run.step(3, loss=float("inf"), poison=True)  # NaN
    assert all(weight.grad is None for weight in run.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(run.tensors(), before, strict=True))


def test_neither_gradients_nor_weights_are_copied() -> None:
    run = Run(TRAIN, one_pass=True, copies=True)
    run.step(0)
    with profile(record_shapes=True) as profiler:
        run.step(1)
    events = list(profiler.events())
    assert [event.name for event in events].count("palette::adamw") == 1
    shapes = [list(weight.shape) for weight in run.mixed.copies() if weight.dim() > 1]
    copies = ("aten::clone", "aten::copy_", "aten::_to_copy")
    assert not [e for e in events if e.name in copies and e.input_shapes[0] in shapes]
    assert not {"aten::_foreach_copy_", "aten::_fused_adamw_"} & {event.name for event in events}
