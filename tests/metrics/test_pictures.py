"""PSNR, MAE, SSIM and MS-SSIM against scikit-image and SciPy; the numbers of single images."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import skimage.metrics
import torch
from torch import Tensor

from palette.data import images
from palette.metrics import pixels, structural
from palette.metrics.per_image import PerImage
from palette.metrics.pictures import to_uint8


def _pictures(
    count: int, height: int, width: int, seed: int, noise: float = 20
) -> tuple[Tensor, Tensor]:
    """Smooth pictures and the same with noise."""
    draw = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(
        draw.normal(size=(count, 3, height, width)), (0, 0, 3, 3)
    )
    first = np.clip(128 + 900 * smooth, 0, 255)
    second = np.clip(first + draw.normal(0, noise, first.shape), 0, 255)
    return torch.from_numpy(first.astype(np.uint8)), torch.from_numpy(second.astype(np.uint8))


def test_to_uint8_is_what_is_saved() -> None:
    values = torch.linspace(-1.3, 1.3, 3 * 20 * 20).reshape(3, 20, 20)
    values[0, 0, 0] = torch.nan
    saved = np.asarray(images.to_image(values))
    assert np.array_equal(to_uint8(values[None])[0].permute(1, 2, 0).numpy(), saved)
    grey = to_uint8(values[None, :1])
    assert grey.shape == (1, 3, 20, 20)
    assert torch.equal(grey[0, 0], grey[0, 2])
    for wrong in (values, values[None, :2], values[None].to(torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be float \[N, 1 or 3, H, W\]"):
            to_uint8(wrong)


@pytest.mark.parametrize("size", [(33, 41), (64, 64), (11, 90)])
def test_psnr_and_ssim_are_scikit_images(size: tuple[int, int]) -> None:
    first, second = _pictures(3, *size, seed=1)
    similar = structural.ssim(first, second)
    squared = pixels.errors(first, second).squared.tolist()
    for number in range(3):
        a, b = (side[number].permute(1, 2, 0).numpy() for side in (first, second))
        expected = skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255)
        assert pixels.psnr(squared[number], a.size) == pytest.approx(expected, rel=1e-12)
        expected = skimage.metrics.structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(similar[number]) == pytest.approx(expected, rel=1e-10)


def _multi_scale(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """One channel, five scales, by SciPy's filters."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        full: npt.NDArray[np.float64] = scipy.ndimage.correlate(x, window)
        return full[5:-5, 5:-5]

    result = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        contrast = (2 * cov + 58.5225) / (va + vb + 58.5225)
        light = (2 * ma * mb + 6.5025) / (ma**2 + mb**2 + 6.5025)
        term = (light * contrast).mean() if scale == 4 else contrast.mean()
        result *= max(term, 0.0) ** weight
        if scale < 4:
            a, b = (np.pad(x, [(0, n % 2) for n in x.shape], mode="symmetric") for x in (a, b))
            a, b = (x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3)) for x in (a, b))
    return float(result)


@pytest.mark.parametrize("size", [(161, 190), (176, 177)])
def test_ms_ssim(size: tuple[int, int]) -> None:
    first, second = _pictures(2, *size, seed=2)
    found = structural.ms_ssim(first, second)
    for number in range(2):
        expected = np.mean(
            [
                _multi_scale(first[number, c].double().numpy(), second[number, c].double().numpy())
                for c in range(3)
            ]
        )
        assert float(found[number]) == pytest.approx(expected, rel=1e-10)


def test_ms_ssim_of_small_images_has_fewer_scales() -> None:
    assert [structural.scales(n, 300) for n in (10, 11, 20, 21, 64, 160, 161, 256)] == [
        0, 1, 1, 2, 3, 4, 5, 5,
    ]  # fmt: skip
    first, second = _pictures(1, 11, 15, seed=3)
    assert torch.equal(structural.ms_ssim(first, second), structural.ssim(first, second))
    for size in (32, 64, 161):
        first, _ = _pictures(1, size, size, seed=4)
        assert float(structural.ms_ssim(first, first)) == 1
        assert 0 <= float(structural.ms_ssim(first, 255 - first)) < 0.1


def test_similarity_of_a_picture_does_not_depend_on_its_batch() -> None:
    first, second = _pictures(4, 40, 40, seed=5)
    for function in (structural.ssim, structural.ms_ssim):
        together = function(first, second)
        alone = torch.cat([function(first[i : i + 1], second[i : i + 1]) for i in range(4)])
        assert torch.equal(together, alone)
        assert together.dtype == torch.float64


def test_errors_inside_and_outside_the_mask() -> None:
    first, second = _pictures(3, 16, 24, seed=6)
    mask = torch.zeros(3, 1, 16, 24, dtype=torch.uint8)
    mask[0, :, 4:9, 3:17] = 1
    mask[2] = 1
    found = pixels.errors(first, second, mask)
    difference = np.abs(first.numpy().astype(float) - second.numpy().astype(float))
    hole = np.broadcast_to(mask.numpy() == 1, difference.shape)
    for number in range(3):
        inside, outside = hole[number], ~hole[number]
        assert found.squared[number] == (difference[number] ** 2).sum()
        assert found.absolute_hole[number] == difference[number][inside].sum()
        assert found.absolute_known[number] == difference[number][outside].sum()
        assert found.values_hole[number] == inside.sum()
        assert found.values_known[number] == outside.sum()
    assert torch.equal(pixels.errors(first, second, mask.float()).squared, found.squared)


def test_equal_pictures() -> None:
    first, _ = _pictures(1, 20, 20, seed=7)
    assert pixels.psnr(float(pixels.errors(first, first).squared), first.numel()) == math.inf
    assert float(structural.ssim(first, first)) == 1


@pytest.mark.parametrize(
    ("samples", "truth", "message"),
    [
        (torch.zeros(1, 3, 16, 16), None, r"samples must be uint8 \[N, 3, H, W\], got float32"),
        (torch.zeros(3, 16, 16).byte(), None, r"got uint8 \[3, 16, 16\]"),
        (torch.zeros(0, 3, 16, 16).byte(), None, r"got uint8 \[0, 3, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16).byte(), torch.zeros(1, 3, 16, 17).byte(), "truth has shape"),
        (torch.zeros(1, 3, 10, 16).byte(), None, "at least 11x11, got 10x16"),
    ],
)
def test_wrong_pictures(samples: Tensor, truth: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structural.ssim(samples, samples if truth is None else truth)


def test_wrong_masks() -> None:
    first, second = _pictures(2, 16, 16, seed=8)
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 1, 16, 16\], got"):
        pixels.errors(first, second, torch.ones(2, 3, 16, 16))
    with pytest.raises(ValueError, match="mask must be 1 in the hole"):
        pixels.errors(first, second, torch.full((2, 1, 16, 16), 255))


def test_numbers_of_single_images_add_up_in_any_order() -> None:
    values = torch.from_numpy(
        np.random.default_rng(9).normal(size=300) * 10.0 ** np.arange(300) / 1e150
    )
    whole, merged = PerImage(), PerImage()
    whole.add("a", range(300), values)
    for rank in (2, 0, 1):
        part = PerImage()
        part.add("a", torch.arange(300)[rank::3], values[rank::3])
        merged.merge(part)
    assert merged.mean("a") == whole.mean("a") == math.fsum(values.tolist()) / 300
    assert merged.deviation("a") == whole.deviation("a")
    assert list(merged.column("a")) == list(range(300))
    assert merged.count("a") == 300
    assert merged.column("b") == {}
    with pytest.raises(ValueError, match=r"image 7 was scored twice \(a\)"):
        merged.add("a", [7], torch.tensor([1.0]))
    whole.add("b", [0, 1], torch.tensor([1.0, math.inf]))
    assert whole.mean("b") == math.inf
    assert math.isnan(whole.deviation("b"))
