"""What restoration undoes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from palette.data import images
from palette.data.degrade import blur_with_noise, enlarge, jpeg, lower, paper_quality
from palette.data.order import Draws


def _picture(height: int = 24, width: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_quality_follows_the_paper() -> None:
    drawn = np.array([paper_quality(Draws(seed)) for seed in range(4000)])
    weights = np.array([math.exp(-quality / 10) for quality in range(5, 31)])
    expected = weights / weights.sum()
    found = np.bincount(drawn, minlength=31)[5:] / len(drawn)
    assert (drawn.min(), drawn.max()) == (5, 30)
    spread = np.sqrt(expected * (1 - expected) / len(drawn))
    assert (np.abs(found - expected) < 4 * spread).all()


def test_jpeg_is_what_a_file_of_that_quality_holds(tmp_path) -> None:
    picture = _picture()
    picture.save(tmp_path / "a.jpg", quality=20)
    expected = images.to_tensor(images.read(tmp_path / "a.jpg"))
    assert torch.equal(jpeg(images.to_tensor(picture), 20), expected)


@pytest.mark.parametrize("factor", [2, 2.5, 4, 7.3])
def test_lower_and_enlarge_are_bicubic_as_in_image_programs(factor: float) -> None:
    picture, tensor = _picture(), images.to_tensor(_picture())
    size = (round(40 / factor), round(24 / factor))
    small = lower(tensor, factor)
    expected = picture.resize(size, Image.Resampling.BICUBIC)
    assert (small - images.to_tensor(expected)).abs().max() < 2.1 / 127.5  # Pillow rounds twice
    assert torch.equal(images.to_tensor(images.to_image(small)), small)  # as a file holds it
    large = expected.resize((40, 24), Image.Resampling.BICUBIC)
    found = enlarge(images.to_tensor(expected), (24, 40))
    assert (found - images.to_tensor(large)).abs().max() < 2.1 / 127.5


def test_noise_takes_its_share_of_the_variance() -> None:
    image, noise = torch.full((3, 4, 4), 0.5), torch.ones(3, 4, 4)
    assert torch.equal(blur_with_noise(image, noise, 0.0), image)
    expected = math.sqrt(0.75) * 0.5 + 0.5
    assert torch.allclose(blur_with_noise(image, noise, 0.25), torch.tensor(expected))
