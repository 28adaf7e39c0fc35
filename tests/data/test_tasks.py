"""Tasks: what a network is given and what it should make of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from palette import ops
from palette.data import images, masks, tasks
from palette.data.degrade import enlarge, lower
from palette.data.order import Draws
from palette.data.tasks import TASKS, colorize, grey, inpaint, make_task, register_task, uncrop


def _image(channels: int = 3, height: int = 20, width: int = 28) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("task", [inpaint, uncrop])
def test_inpainting_and_uncropping(task: tasks.Task, channels: int) -> None:
    image = _image(channels)
    entry = task(image, -5, Draws(1))
    hole = entry["mask"]
    assert entry["target"] is image
    assert entry["condition"].shape == image.shape
    assert hole.shape == (1, 20, 28)
    assert hole.dtype == torch.float32
    assert set(hole.unique().tolist()) == {0, 1}
    known = (hole == 0).expand_as(image)
    assert torch.equal(entry["condition"][known], image[known])
    expected = ops.noise(torch.tensor([-5]), 0, image.shape, stream=1)[0]
    assert torch.equal(entry["condition"][~known], expected[~known])


def test_the_mask_follows_the_draws_and_the_noise_the_seed() -> None:
    first, other = inpaint(_image(), 1, Draws(1)), inpaint(_image(), 2, Draws(1))
    assert torch.equal(first["mask"], other["mask"])
    assert not torch.equal(first["condition"], other["condition"])
    assert not torch.equal(first["mask"], inpaint(_image(), 1, Draws(2))["mask"])


def test_given_noise_is_used() -> None:
    noise = torch.full((3, 20, 28), 7.0)
    entry = inpaint(_image(), 1, Draws(1), mask=masks.center, noise=noise)
    assert (entry["condition"][:, 5:15, 7:21] == 7).all()
    assert (entry["condition"] == 7).sum() == 3 * 10 * 14


def test_colorize() -> None:
    image = _image()
    entry = colorize(image, 0, Draws(0))
    assert set(entry) == {"target", "condition"}
    assert entry["condition"].shape == image.shape
    assert torch.equal(entry["condition"][0], entry["condition"][2])
    with pytest.raises(ValueError, match=r"shape \[3, H, W\] to colorize, got \[1, 20, 28\]"):
        colorize(_image(1), 0, Draws(0))


def test_grey_is_what_a_grey_file_holds() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    ours = grey(images.to_tensor(picture))
    file = images.to_tensor(picture.convert("L"), channels=1)
    assert (ours[:1] - file).abs().max() <= 1 / 127.5 + 1e-6  # Pillow rounds its weights
    assert torch.equal(images.to_tensor(images.to_image(ours)), ours)
    white = torch.ones(3, 2, 2)
    assert torch.equal(grey(white), white)
    assert torch.equal(grey(-white), -white)


def test_tasks_by_name() -> None:
    assert {"inpaint", "uncrop", "colorize"} <= set(TASKS)
    entry = make_task("inpaint", mask="center")(_image(), 0, Draws(0))
    assert entry["mask"].sum() == 10 * 14
    assert make_task("colorize", mask="center") is colorize
    assert make_task("uncrop") is uncrop
    with pytest.raises(ValueError, match=r"task must be one of colorize, .*, got 'paint'"):
        make_task("paint")
    with pytest.raises(ValueError, match="mask must be one of"):
        make_task("inpaint", mask="round")


def test_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS", dict(TASKS))

    @register_task("negate")
    def negate(image: torch.Tensor, seed: int, draws: Draws) -> tasks.Entry:
        return {"target": image, "condition": -image}

    entry = make_task("negate")(_image(), 0, Draws(0))
    assert torch.equal(entry["condition"], -entry["target"])
    with pytest.raises(ValueError, match="'negate' is registered already"):
        register_task("negate")(negate)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_restore_jpeg(channels: int) -> None:
    image = _image(channels)
    poor, good = (
        make_task("restore_jpeg", quality=quality)(image, 0, Draws(0))["condition"]
        for quality in (5, 95)
    )
    assert poor.shape == image.shape
    assert (good - image).abs().mean() < (poor - image).abs().mean()
    drawn = make_task("restore_jpeg")
    assert torch.equal(
        drawn(image, 0, Draws(3))["condition"], drawn(image, 9, Draws(3))["condition"]
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_upscale(channels: int) -> None:
    image = _image(channels, 21, 30)
    entry = make_task("upscale", factor=2.5)(image, 4, Draws(1))
    assert set(entry) == {"target", "condition"}
    assert torch.equal(entry["condition"], enlarge(lower(image, 2.5), (21, 30)))


def test_upscale_knows_how_noisy_its_condition_is() -> None:
    image = torch.ones(3, 64, 64)
    task = make_task("upscale", augmentation=0.6)
    entries = [task(image, seed, Draws(seed)) for seed in range(50)]
    for seed, entry in enumerate(entries):
        noise = ops.noise(torch.tensor([seed]), 0, image.shape, stream=1)[0]
        expected = entry["level"].sqrt() + (1 - entry["level"]).sqrt() * noise
        assert torch.allclose(entry["condition"], expected, atol=1e-5)
    levels = torch.stack([entry["level"] for entry in entries])
    assert levels.min() > 0.4
    assert 0.6 < levels.mean() < 0.8


def test_generate_has_a_condition_without_channels() -> None:
    entry = make_task("generate")(_image(), 0, Draws(0))
    assert entry["condition"].shape == (0, 20, 28)
    assert "mask" not in entry


def test_mixture_draws_its_tasks_by_weight() -> None:
    names = ["inpaint", "colorize", "upscale", "restore_jpeg"]
    options = {"mask": "center", "quality": 9, "augmentation": 0.3, "factor": 4.0}
    task = make_task("mixture", tasks=names, weights=[6.0, 3.0, 1.0, 0.0], **options)
    image = _image()
    entries = [task(image, seed, Draws(seed)) for seed in range(400)]
    drawn = [entry["task"] for entry in entries]
    shares = [drawn.count(name) / len(drawn) for name in names]
    assert np.abs(np.array(shares) - (0.6, 0.3, 0.1, 0.0)).max() < 0.08
    for entry in entries:
        assert set(entry) == {"target", "condition", "mask", "level", "task"}
        assert entry["mask"].mean() == (0.25 if entry["task"] == "inpaint" else 1.0)
        assert (entry["level"] < 1) == (entry["task"] == "upscale")
    plain = make_task("mixture", tasks=["colorize"], weights=[1.0], augmentation=0.3)
    assert set(plain(image, 0, Draws(0))) == {"target", "condition", "mask", "task"}
