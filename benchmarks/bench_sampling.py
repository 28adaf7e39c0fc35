"""One step of the reverse process of the published network: ours beside what else there is to pick.

    pytest benchmarks/bench_sampling.py

Each row is one size and batch; times are milliseconds a step, medians, the contestants in turn in
one process. "eager" is the published arithmetic in float32, "bf16" the same network in bfloat16
and channels-last, "compiled" that one through ``torch.compile``, "openvino" that of OpenVINO in
bfloat16 where it is installed, in a process of its own, and "floor" the network's own convolutions
alone, weights packed, which no fusion of the rest can undercut. The second table has the time until
the first steps are done, compilation included.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palette import ops
from palette.diffusion.sampler import Sampler
from palette.diffusion.schedule import Schedule, spaced
from palette.models.layers import PointwiseConv
from palette.models.packed import pack
from palette.models.unet import UNet
from palette.training.summary import unfuse

GPU = torch.cuda.is_available()
SIZES = [(side, batch) for side in (64, 128, 256) for batch in ((1, 8, 32) if GPU else (1, 4))]
STEPS = 2


def published_network() -> UNet:
    """The published 62.6 M network for 256 pixels, with weights that do nothing in particular."""
    torch.manual_seed(0)
    network = UNet(
        image_size=256,
        in_channels=6,
        out_channels=3,
        channels=64,
        channel_mults=(1, 2, 4, 8),
        res_blocks=2,
        attention_resolutions=(32,),
        dropout=0.2,
        head_channels=32,
        attention_order="legacy",
        embedding="gamma",
        zero_init=False,
    )
    return network.eval()


def plain_network() -> UNet:
    """The same of PyTorch's own layers."""
    network = published_network()
    unfuse(network)
    return network


def _published_steps(network: nn.Module, condition: Tensor) -> Callable[[], Tensor]:
    """As the published code samples: everything anew in every step."""
    dtype = next(network.parameters()).dtype
    gamma = torch.full((len(condition), 1), 0.5, device=condition.device)

    def run() -> Tensor:
        state = torch.randn_like(condition)
        for _ in range(STEPS):
            x = torch.cat([condition, state], dim=1).to(dtype, memory_format=torch.channels_last)
            with ops.use("sdpa" if dtype != torch.float32 else "reference"):
                output = network(x, gamma[:, 0]).float()
            x0 = (1.4 * state - 1.0 * output).clamp_(-1.0, 1.0)
            state = 0.3 * x0 + 0.7 * state + 0.1 * torch.randn_like(state)
        return state

    return run


def _our_steps(condition: Tensor, device: str) -> Callable[[], Tensor]:
    network = published_network().to(device, torch.bfloat16)
    levels = spaced(Schedule.from_name("linear", 1000, 1e-4, 0.09), STEPS)
    sampler = Sampler(pack(network), levels, dtype=torch.bfloat16)
    seeds = torch.arange(len(condition), device=device)
    return lambda: sampler.sample(condition, seeds=seeds)


def _convolutions(condition: Tensor) -> Callable[[], object]:
    """The network's own convolutions on the inputs they get there, packed, as often as steps."""
    network = published_network().to(torch.bfloat16)
    calls: list[tuple[nn.Module, Tensor]] = []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, PointwiseConv)):
            layer.register_forward_hook(lambda layer, x, _: calls.append((layer, x[0])))
    gamma = torch.full((len(condition),), 0.5)
    network(torch.cat([condition, condition], dim=1).to(torch.bfloat16), gamma)
    for layer, _ in calls:
        layer._forward_hooks.clear()
    packed = [(pack(nn.Sequential(layer)), x) for layer, x in calls]

    def run() -> None:
        for _ in range(STEPS):
            for layer, x in packed:
                layer(x)

    return run


def _openvino(side: int, batch: int) -> float | None:
    """Seconds a step of OpenVINO in bfloat16, in a process of its own."""
    if importlib.util.find_spec("openvino") is None:
        return None
    command = [sys.executable, str(Path(__file__).with_name("openvino_step.py"))]
    ran = subprocess.run([*command, str(side), str(batch)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return float(ran.stdout.split()[-1])


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_step(benchmark, interleaved, row, device, side, batch) -> None:
    torch.manual_seed(side)
    condition = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    plain = plain_network().to(device)
    half = copy.deepcopy(plain).to(torch.bfloat16)
    contestants: dict[str, Callable[[], object]] = {
        "eager": _published_steps(plain, condition),
        "bf16": _published_steps(half, condition),
        "ours": _our_steps(condition, device),
    }
    if batch == 1:
        options = {"mode": "max-autotune"} if GPU else {"options": {"freezing": True}}
        compiled = torch.compile(copy.deepcopy(half), **options)
        contestants["compiled"] = _published_steps(compiled, condition)
    first: dict[str, float] = {}
    with torch.no_grad():
        if not GPU:
            contestants["floor"] = _convolutions(condition)
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            first[name] = time.perf_counter() - start
        found = interleaved(contestants, seconds=20.0 if not GPU else 2.0)
        benchmark.pedantic(contestants["ours"], rounds=3, warmup_rounds=1)
    seconds = {name: value / STEPS for name, value in found.items()}
    other = _openvino(side, batch) if batch == 1 and not GPU else None
    if other is not None:
        seconds["openvino"] = other
    shape = f"{side}x{side}, batch {batch}"
    kind = "all" if batch == 1 else "eager"
    row(f"a step of the published network ({kind})", shape, 1, seconds)
    row(f"the first {STEPS} steps ({kind})", shape, 1, first)
    assert np.isfinite(list(seconds.values())).all()
