"""The training loss: values by hand, randomness from the seeds, independence from the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palette.diffusion.objective import loss, prediction_target
from palette.diffusion.schedule import Schedule

SCHEDULE = Schedule.from_name("linear", 2000, 1e-6, 0.01)


class Recorder:
    """A network that keeps what it was asked and answers with a fixed share of its input."""

    def __init__(self, share: float = 0.5) -> None:
        self.share = share
        self.asked: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def __call__(
        self, x: Tensor, gamma: Tensor, label: Tensor | None, seeds: Tensor | None
    ) -> Tensor:
        self.asked.append((x, gamma, label, seeds))
        return self.share * x[:, -3:] * gamma[:, None, None, None]


def make_batch(count: int = 4, size: int = 6, *, mask: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    batch = {"target": target, "condition": torch.randn(count, 3, size, size, generator=generator)}
    if mask:
        hole = torch.zeros(count, 1, size, size)
        for i in range(count):
            hole[i, :, : i + 1, 1:4] = 1
        batch["mask"] = hole
    return batch


def test_known_pixels_go_in_clean_and_only_the_hole_counts() -> None:
    batch, seeds, network = make_batch(), torch.arange(4), Recorder()
    result = loss(network, SCHEDULE, batch, seeds)
    noisy, hole = network.asked[0][0][:, 3:], batch["mask"].bool().expand(-1, 3, -1, -1)
    assert torch.equal(noisy[~hole], batch["target"][~hole])
    assert (noisy[hole] != batch["target"][hole]).all()

    def spoiled(x: Tensor, *rest: Tensor | None) -> Tensor:
        return torch.where(hole, network(x, *rest), 1e6)

    assert torch.equal(loss(spoiled, SCHEDULE, batch, seeds).per_sample, result.per_sample)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_values_by_hand(kind: str) -> None:
    batch, gamma = make_batch(), torch.tensor([0.1, 0.4, 0.7, 0.95])
    noise = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    network = Recorder()
    options = {"kind": kind, "noise": noise, "gamma": gamma, "huber_delta": 0.3}
    ours = loss(network, SCHEDULE, batch, None, **options)
    plain = loss(network, SCHEDULE, batch, None, **options, normalise=False)
    x = network.asked[0][0]
    for i in range(4):
        hole = batch["mask"][i].bool().expand(3, -1, -1)
        difference = (network.share * gamma[i] * x[i, 3:] - noise[i])[hole]
        distance = {
            "l1": difference.abs(),
            "l2": difference**2,
            "huber": torch.where(
                difference.abs() < 0.3, difference**2 / 2, 0.3 * (difference.abs() - 0.15)
            ),
        }[kind]
        assert ours.per_sample[i].item() == pytest.approx(distance.mean().item(), rel=1e-5)
        assert plain.per_sample[i].item() == pytest.approx(distance.sum().item() / 108, rel=1e-5)
    assert ours.total.item() == pytest.approx(ours.per_sample.mean().item(), rel=1e-6)
    assert torch.equal(ours.gamma, gamma)


def test_an_image_without_a_hole_costs_nothing() -> None:
    batch = make_batch()
    batch["mask"][1] = 0
    batch["mask"] = batch["mask"].to(torch.uint8)
    result = loss(Recorder(), SCHEDULE, batch, torch.arange(4))
    assert result.per_sample[1] == 0
    assert result.per_sample.isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_perfect_network_has_no_loss(prediction: str) -> None:
    batch = make_batch(mask=False)
    noise = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    gamma = torch.tensor([0.1, 0.4, 0.7, 0.95])

    def perfect(x: Tensor, gamma: Tensor, label: Tensor | None, seeds: Tensor | None) -> Tensor:
        level = gamma[:, None, None, None]
        epsilon = (x[:, 3:] - level.sqrt() * batch["target"]) / (1 - level).sqrt()
        return prediction_target(prediction, batch["target"], epsilon, gamma)

    options = {"prediction": prediction, "noise": noise, "gamma": gamma}
    assert loss(perfect, SCHEDULE, batch, None, **options).total < 1e-11
    zero = loss(Recorder(0.0), SCHEDULE, batch, None, **options).per_sample
    wanted = prediction_target(prediction, batch["target"], noise, gamma)
    torch.testing.assert_close(zero, (wanted**2).mean((1, 2, 3)))


def test_v_lies_between_noise_and_image() -> None:
    target, noise = torch.full((2, 1, 1, 1), 0.5), torch.full((2, 1, 1, 1), -1.0)
    v = prediction_target("v", target, noise, torch.tensor([1.0, 0.36])).flatten()
    torch.testing.assert_close(v, torch.tensor([-1.0, -0.6 - 0.8 * 0.5]))


def test_min_snr_weights_every_prediction_as_the_same_x0_loss() -> None:
    batch, gamma = make_batch(), torch.tensor([0.01, 0.4, 0.9, 0.999])
    noise = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    snr = gamma / (1 - gamma)

    def guess(x: Tensor, prediction: str, gamma: Tensor) -> Tensor:
        """The same wrong x0, said in each prediction's words."""
        level = gamma[:, None, None, None]
        noisy = level.sqrt() * batch["target"] + (1 - level).sqrt() * noise
        wrong = 0.9 * batch["target"] + 0.05
        epsilon = (noisy - level.sqrt() * wrong) / (1 - level).sqrt()
        return prediction_target(prediction, wrong, epsilon, gamma)

    for prediction in ("epsilon", "x0", "v"):
        result = loss(
            lambda x, gamma, label, seeds, p=prediction: guess(x, p, gamma),
            SCHEDULE,
            batch,
            None,
            prediction=prediction,
            min_snr=5.0,
            noise=noise,
            gamma=gamma,
        )
        wrong = (0.1 * batch["target"] - 0.05) ** 2 * batch["mask"]
        x0_loss = wrong.sum((1, 2, 3)) / (3 * batch["mask"].sum((1, 2, 3)))
        torch.testing.assert_close(
            result.per_sample, x0_loss * snr.clamp(max=5), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(
    ("prediction", "weights"),  # of Hang et al. 2023 at a ratio of 1/4, 1, 4 and 9, limit 5
    [
        ("x0", [0.25, 1, 4, 5]),
        ("epsilon", [1, 1, 1, 5 / 9]),
        ("v", [0.25 / 1.25, 1 / 2, 4 / 5, 5 / 10]),
    ],
)
def test_min_snr_weights_are_those_of_its_paper(prediction: str, weights: list[float]) -> None:
    def costs(min_snr: float | None) -> Tensor:
        return loss(
            lambda x, gamma, label, seeds: x[:, :3] + 0.3,
            SCHEDULE,
            make_batch(),
            torch.arange(4),
            prediction=prediction,
            min_snr=min_snr,
            gamma=torch.tensor([0.2, 0.5, 0.8, 0.9]),
        ).per_sample

    torch.testing.assert_close(costs(5.0) / costs(None), torch.tensor(weights), rtol=1e-5, atol=0)


def test_a_sample_costs_the_same_in_any_batch() -> None:
    batch, seeds = make_batch(), torch.tensor([5, -3, 2**62, 0])
    network = Recorder()
    together = loss(network, SCHEDULE, batch, seeds)
    assert torch.equal(network.asked[0][3], seeds)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = loss(network, SCHEDULE, {k: v[order] for k, v in batch.items()}, seeds[order])
    assert torch.equal(shuffled.per_sample, together.per_sample[order])
    for i in range(4):
        alone = loss(
            network, SCHEDULE, {k: v[i : i + 1] for k, v in batch.items()}, seeds[i : i + 1]
        )
        assert torch.equal(alone.per_sample[0], together.per_sample[i])
        assert torch.equal(alone.gamma[0], together.gamma[i])
    other = loss(network, SCHEDULE, batch, seeds + 1)
    assert (other.gamma != together.gamma).all()


def test_noise_levels_are_those_of_training() -> None:
    seeds = torch.arange(2000)
    batch = {"target": torch.zeros(2000, 1, 1, 1), "condition": torch.zeros(2000, 0, 1, 1)}
    gamma = loss(lambda x, *rest: x, SCHEDULE, batch, seeds).gamma
    low, high = SCHEDULE.range
    assert low * (1 - 1e-6) <= gamma.min()
    assert gamma.max() <= high * (1 + 1e-6)
    assert gamma.mean() == pytest.approx(SCHEDULE.gammas.mean(), abs=0.02)


def test_labels_are_dropped_at_the_given_rate() -> None:
    seeds = torch.arange(4000)
    batch = {
        "target": torch.zeros(4000, 3, 1, 1),
        "condition": torch.zeros(4000, 0, 1, 1),
        "label": torch.arange(4000) % 10,
    }
    network = Recorder()
    loss(network, SCHEDULE, batch, seeds, label_drop=0.1, null_label=10)
    loss(network, SCHEDULE, batch, seeds, null_label=10)
    dropped, kept = network.asked[0][2], network.asked[1][2]
    assert dropped is not None
    assert dropped.dtype == torch.int64
    assert torch.equal(kept, batch["label"])
    share = (dropped == 10).float().mean()
    assert share == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[dropped != 10], batch["label"][dropped != 10])


def test_gradient_reaches_the_network_alone() -> None:
    weight = torch.tensor(0.3, requires_grad=True)
    result = loss(lambda x, *rest: weight * x[:, 3:], SCHEDULE, make_batch(), torch.arange(4))
    result.total.backward()
    assert weight.grad is not None
    assert weight.grad.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "noise"}, "prediction is 'noise'"),
        ({"kind": "mse"}, "loss kind is 'mse', expected one of l2, l1, huber"),
        ({"huber_delta": 0.0}, "huber_delta is 0.0"),
        ({"min_snr": -1.0}, "min_snr is -1.0"),
        ({"label_drop": 1.5}, "label_drop is 1.5"),
        ({"label_drop": 0.1}, "null_label is None"),
        ({}, "seeds is None"),
        ({"gamma": torch.full((4,), 0.5)}, "seeds is None"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(Recorder(), SCHEDULE, make_batch(), None, **options)


def test_a_regression_sees_neither_target_nor_noise() -> None:
    for mask in (True, False):
        batch, network = make_batch(mask=mask), Recorder()
        result = loss(network, SCHEDULE, batch, None, prediction="regression")
        x, gamma, _, _ = network.asked[0]
        hole = batch["mask"] if mask else torch.ones(4, 1, 6, 6)
        assert torch.equal(x[:, 3:], batch["target"] * (1 - hole))
        assert torch.equal(gamma, torch.full((4,), SCHEDULE.range[0]))
        answer = network(x, gamma, None, None)
        squared = ((answer - batch["target"]) * hole).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(result.per_sample, squared / hole.mean(dim=(1, 2, 3)))
