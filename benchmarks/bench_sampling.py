"""Sampling with the published network for 256 pixels: ours beside what else there is to pick.

    pytest benchmarks/bench_sampling.py [-k 128-1]

All contestants take steps of the reverse process with 62.6 million parameters:

- eager: the published arithmetic in float32, everything anew in every step
- bf16: the same network in bfloat16 and channels-last
- compiled: that one through ``torch.compile``, with freezing on a CPU, max-autotune on a GPU
- openvino: in bfloat16, where it is installed
- diffusers: ``UNet2DModel`` of the same channels and blocks, with one attention in the middle and
  resampling in residual blocks (62,640,323 parameters against 62,641,347), in bfloat16 and
  channels-last, its projections fused
- accelerated: that one after ``palette.accelerate``
- ours: ``Sampler`` in bfloat16
- floor: our network's convolutions alone on the inputs they get there, weights packed, on a GPU as
  one graph: what no fusion of the rest can undercut

The first tables have milliseconds a step: medians, the contestants in turn in one process, except
that ``compiled`` and ``openvino`` have one of their own on a CPU. Then one table for each size and
batch: seconds a step, images a second at 25 evaluations, seconds to the first image (first steps
with all compiling, packing and capturing, the rest at the speed of the first column), and the most
memory held while sampling, over that before the network was built: resident in a process of its
own on a CPU, allocated by PyTorch on a GPU. The last table is one image of 256x256.

    python benchmarks/bench_sampling.py NAME SIDE BATCH

measures one contestant by itself and prints JSON.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import palette
from palette import ops
from palette.diffusion.graph import Graphs, Repeated
from palette.diffusion.sampler import Sampler
from palette.diffusion.schedule import Schedule, spaced
from palette.models.layers import PointwiseConv
from palette.models.packed import pack
from palette.models.unet import UNet
from palette.models.unfused import unfuse

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
SIZES = [(side, batch) for side in (64, 128, 256) for batch in ((1, 8, 32) if GPU else (1, 4))]
STEPS = 10 if GPU else 2  # of one call; the more, the less its beginning counts
EVALUATIONS, PUBLISHED = 25, 1000  # of an image: our default, and as published
SCHEDULE = Schedule.from_name("linear", 1000, 1e-4, 0.09)
ALONE = ("compiled", "openvino")  # on a CPU, in a process of their own
LIBRARIES = {
    "openvino": "openvino",
    "diffusers": "diffusers.models.unets.unet_2d",
    "accelerated": "diffusers.models.unets.unet_2d",
}
ROOT = Path(__file__).resolve().parents[1]

Run = Callable[[int], object]
"""Takes so many steps from noise."""


def published_network(dtype: torch.dtype = torch.float32) -> UNet:
    """The published network for 256 pixels, with weights that do nothing in particular."""
    torch.manual_seed(0)
    with DEVICE:
        network = UNet(
            image_size=256,
            in_channels=6,
            out_channels=3,
            channels=64,
            channel_mults=(1, 2, 4, 8),
            res_blocks=2,
            attention_resolutions=(),
            dropout=0.2,
            head_channels=32,
            attention_order="legacy",
            embedding="gamma",
            zero_init=False,
        )
    return network.eval().to(dtype)


def plain_network(dtype: torch.dtype = torch.float32) -> UNet:
    """The same of PyTorch's own layers."""
    network = published_network(dtype)
    unfuse(network)
    return network


def _loop(network: Callable[[Tensor], Tensor], condition: Tensor, dtype: torch.dtype) -> Run:
    """As the published code samples: everything anew in every step."""

    def run(steps: int) -> Tensor:
        state = torch.randn_like(condition)
        for _ in range(steps):
            x = torch.cat([condition, state], dim=1).to(dtype, memory_format=torch.channels_last)
            output = network(x).float()
            x0 = (1.4 * state - 1.0 * output).clamp_(-1.0, 1.0)
            state = 0.3 * x0 + 0.7 * state + 0.1 * torch.randn_like(state)
        return state

    return run


def _plain(network: nn.Module, condition: Tensor, dtype: torch.dtype, backend: str) -> Run:
    gamma = torch.full((len(condition),), 0.5, device=condition.device)

    def answer(x: Tensor) -> Tensor:
        with ops.use(backend):
            output: Tensor = network(x, gamma)
        return output

    return _loop(answer, condition, dtype)


def eager(condition: Tensor) -> Run:
    network = plain_network(torch.float32)
    return _plain(network, condition, torch.float32, "reference")


def bf16(condition: Tensor) -> Run:
    network = plain_network(torch.bfloat16)
    return _plain(network, condition, torch.bfloat16, "sdpa")


def compiled(condition: Tensor) -> Run:
    network = plain_network(torch.bfloat16)
    options: dict[str, Any] = {"mode": "max-autotune"} if GPU else {"options": {"freezing": True}}
    return _plain(torch.compile(network, **options), condition, torch.bfloat16, "sdpa")


def diffusers(condition: Tensor, accelerate: bool = False) -> Run:
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    torch.manual_seed(0)
    with DEVICE:
        network = UNet2DModel(
            sample_size=256,
            in_channels=6,
            out_channels=3,
            block_out_channels=(64, 128, 256, 512),
            layers_per_block=2,
            down_block_types=("ResnetDownsampleBlock2D",) * 4,
            up_block_types=("ResnetUpsampleBlock2D",) * 4,
            attention_head_dim=32,
            resnet_time_scale_shift="scale_shift",
        )
    network = network.eval().to(torch.bfloat16)
    network = network.to(memory_format=torch.channels_last)
    attention = network.mid_block.attentions[0]
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    if accelerate:
        palette.accelerate(network)
    return _loop(lambda x: network(x, 500).sample, condition, torch.bfloat16)


def accelerated(condition: Tensor) -> Run:
    return diffusers(condition, accelerate=True)


def ours(condition: Tensor) -> Run:
    network = pack(published_network(torch.bfloat16))
    seeds = torch.arange(len(condition), device=condition.device)

    @cache
    def sampler(steps: int) -> Sampler:
        return Sampler(network, spaced(SCHEDULE, steps), dtype=torch.bfloat16)

    return lambda steps: sampler(steps).sample(condition, seeds=seeds)


def floor(condition: Tensor) -> Run:
    network = published_network(torch.bfloat16)
    calls: list[tuple[nn.Module, Tensor]] = []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, PointwiseConv)):
            layer.register_forward_hook(lambda layer, x, _: calls.append((layer, x[0])))
    gamma = torch.full((len(condition),), 0.5, device=condition.device)
    network(torch.cat([condition, condition], dim=1).to(torch.bfloat16), gamma)
    for layer, _ in calls:
        layer._forward_hooks.clear()
    packed = [(pack(nn.Sequential(layer)), x) for layer, x in calls]

    def once() -> None:
        for layer, x in packed:
            layer(x)

    repeated = Repeated(Graphs(DEVICE)) if GPU else None

    def run(steps: int) -> None:
        for _ in range(steps):
            once() if repeated is None else repeated.do(once)

    return run


def openvino(condition: Tensor) -> Run:
    import openvino

    network = plain_network(torch.float32)
    gamma = torch.full((len(condition),), 0.5)
    inputs = torch.cat([condition, condition], dim=1), gamma
    with ops.use("reference"):
        wanted = network(*inputs)
        model = openvino.convert_model(
            network, example_input=inputs, input=[tuple(each.shape) for each in inputs]
        )
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    request = openvino.compile_model(model, "CPU", hints).create_infer_request()

    def answer(x: Tensor) -> Tensor:
        return torch.from_numpy(next(iter(request.infer([x.numpy(), gamma.numpy()]).values())))

    error = (answer(inputs[0]) - wanted).norm() / wanted.norm()
    assert error < 0.1, f"OpenVINO is {error:.3g} from PyTorch: not worth a time"
    return _loop(lambda x: answer(x.contiguous()), condition, torch.float32)


CONTESTANTS: dict[str, Callable[[Tensor], Run]] = {
    each.__name__: each
    for each in (eager, bf16, compiled, openvino, diffusers, accelerated, ours, floor)
}


def _takes_part(name: str, side: int, batch: int) -> bool:
    """Compilers seldom: one takes a minute for each shape, and max-autotune on a GPU several."""
    if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name].partition(".")[0]) is None:
        return False
    if name == "openvino":
        return batch == 1 and not GPU
    return name != "compiled" or (batch == 1 and (side == 256 or not GPU))


def _condition(side: int, batch: int) -> Tensor:
    torch.manual_seed(side)
    return torch.rand(batch, 3, side, side, device=DEVICE) * 2 - 1


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def _resident(most: bool = False) -> float:
    """Megabytes of this process in memory, now or at ``most``; NaN where Linux is missing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    found = re.search(r"VmHWM:\s+(\d+)" if most else r"VmRSS:\s+(\d+)", status.read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def _forget_peak() -> None:
    """Return what building and compiling have freed, and let the peak begin anew."""
    peak, libc = Path("/proc/self/clear_refs"), ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if peak.exists():
        peak.write_text("5")


class Measured:
    """One contestant, built and run for the first time.

    Attributes:
        run: the contestant.
        first: seconds of its first ``STEPS`` steps.
        megabytes: see above.
    """

    def __init__(self, name: str, condition: Tensor) -> None:
        if name in LIBRARIES:  # its code is no memory that sampling takes
            importlib.import_module(LIBRARIES[name])
        before = torch.cuda.memory_allocated() if GPU else _resident()
        self.run = CONTESTANTS[name](condition)
        _wait()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.run(STEPS)
        _wait()
        self.first = time.perf_counter() - start
        if GPU:
            self.megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        else:
            _forget_peak()
            self.run(1)
            self.megabytes = _resident(most=True) - before


def _alone(name: str, side: int, batch: int) -> dict[str, float]:
    """What a process of its own says of a contestant: first, megabytes, step."""
    command = [sys.executable, __file__, name, str(side), str(batch)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def _measure_alone(name: str, side: int, batch: int) -> dict[str, float]:
    measured = Measured(name, _condition(side, batch))
    times: list[float] = []
    while name in ALONE and (len(times) < 3 or sum(times) < 8.0):
        start = time.perf_counter()
        measured.run(STEPS)
        times.append(time.perf_counter() - start)
    step = statistics.median(times) / STEPS if times else float("nan")
    return {"first": measured.first, "megabytes": measured.megabytes, "step": step}


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_step(benchmark, interleaved, row, line, side, batch, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled yet
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    condition = _condition(side, batch)
    names = [name for name in CONTESTANTS if _takes_part(name, side, batch)]
    together = [name for name in names if GPU or name not in ALONE]
    with torch.no_grad():
        if GPU:
            alone = {name: vars(Measured(name, condition)) for name in names}
            runs = {name: each["run"] for name, each in alone.items()}
        else:
            alone = {name: _alone(name, side, batch) for name in names if name != "floor"}
            runs = {name: CONTESTANTS[name](condition) for name in together}
        calls = {name: lambda run=run: run(STEPS) for name, run in runs.items()}
        found = interleaved(calls, seconds=2.0 if GPU else 8.0, least=3)
        benchmark.pedantic(calls["ours"], rounds=1)
    steps = {name: found[name] / STEPS if name in found else alone[name]["step"] for name in names}
    shape, kinds = f"{side}x{side}, batch {batch}", "+".join(names)
    row(f"a step of the published network ({kinds})", shape, 1, steps)
    for name in (each for each in names if each != "floor"):
        first = alone[name]["first"] + (EVALUATIONS - STEPS) * steps[name]
        columns = {
            "contestant": name,
            "s a step": steps[name],
            "images/s": batch / (EVALUATIONS * steps[name]),
            "s to the first image": first,
            "MB": alone[name]["megabytes"],
            "step/ours": steps[name] / steps["ours"],
        }
        line(f"the published network, {shape}, {EVALUATIONS} evaluations an image", columns)
    assert np.isfinite(list(steps.values())).all()


def test_one_image(benchmark, interleaved, line, monkeypatch) -> None:
    """256x256, ours by its defaults; the published thousand steps from the time of a few."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    condition = _condition(256, 1)
    with torch.no_grad():
        image, published = ours(condition), eager(condition)
        calls = {"ours": lambda: image(EVALUATIONS), "eager": lambda: published(STEPS)}
        found = interleaved(calls, seconds=2.0 if GPU else 8.0, least=3)
        benchmark.pedantic(calls["ours"], rounds=1)
    seconds = found["eager"] / STEPS * PUBLISHED
    line(
        "one image, 256x256 (published: extrapolated from seconds a step)",
        {
            "shape": "256x256, batch 1",
            f"ours, {EVALUATIONS} evaluations, s": found["ours"],
            f"published, {PUBLISHED} steps in eager float32, s": seconds,
            "published/ours": seconds / found["ours"],
        },
    )


if __name__ == "__main__":
    name, side, batch = sys.argv[1:]
    print(json.dumps(_measure_alone(name, int(side), int(batch))))
