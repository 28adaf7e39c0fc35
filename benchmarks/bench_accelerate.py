"""diffusers' UNet2DModel as it is and after ``palette.accelerate``: inference and training steps.

    pytest benchmarks/bench_accelerate.py

Both run in turn in one process and the medians are compared; a network whose results differ by
more than rounding fails before it is timed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import palette

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with palette's [test] extra")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
# side in pixels, channels of the levels: all of them small, the last with large feature maps
SIZES = [(32, (64, 128, 128)), (64, (64, 128, 256)), (128, (64, 64, 128))]


def _networks(
    side: int, channels: tuple[int, ...], time: str, dtype: str, layout: str, device: str
) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network, the same one accelerated, and an input."""
    torch.manual_seed(side)
    plain = diffusers.UNet2DModel(
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        resnet_time_scale_shift=time,
        attn_norm_num_groups=32,
    )
    plain = plain.eval().to(device, DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    ours = copy.deepcopy(plain)
    report = palette.accelerate(ours)
    assert not report.left, str(report)
    x = torch.randn(1, 3, side, side, device=device, dtype=DTYPES[dtype])
    return plain, ours, x.to(memory_format=LAYOUTS[layout])


def _check(plain: nn.Module, ours: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        before, after = plain(x, 500).sample, ours(x, 500).sample
    allowed = 2e-5 if x.dtype == torch.float32 else 0.05
    assert (after - before).abs().max() <= allowed * before.abs().max(), "wrong: not worth a time"


@pytest.mark.parametrize(("side", "channels"), SIZES)
@pytest.mark.parametrize("time", ["default", "scale_shift"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(
    benchmark, interleaved, row, device, dtype, layout, time, side, channels
) -> None:
    plain, ours, x = _networks(side, channels, time, dtype, layout, device)
    _check(plain, ours, x)
    with torch.inference_mode():
        found = interleaved(
            {"eager": lambda: plain(x, 500), "ours": lambda: ours(x, 500)}, seconds=1.5
        )
        benchmark.pedantic(ours, args=(x, 500), rounds=3, warmup_rounds=1)
    table = f"accelerated UNet2DModel, {time}, inference, {layout}, {dtype}"
    row(table, f"{side}x{side} {channels}", 1, found)


@pytest.mark.parametrize(("side", "channels"), SIZES[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_training(benchmark, interleaved, row, device, dtype, layout, side, channels) -> None:
    plain, ours, x = _networks(side, channels, "scale_shift", dtype, layout, device)
    _check(plain, ours, x)

    def step(network: nn.Module) -> None:
        network(x, 500).sample.float().square().mean().backward()

    found = interleaved({"eager": lambda: step(plain), "ours": lambda: step(ours)}, seconds=2)
    benchmark.pedantic(step, args=(ours,), rounds=3, warmup_rounds=1)
    table = f"accelerated UNet2DModel, scale_shift, training, {layout}, {dtype}"
    row(table, f"{side}x{side} {channels}", 1, found)
