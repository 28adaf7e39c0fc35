"""One training step of the published network: ours beside what else there is to pick.

    pytest benchmarks/bench_training.py -k "64"        # one row: the side of its pictures

The first table has milliseconds a step, medians, the contestants in turn in one process on a batch
at hand:

- "eager": the published trainer's arithmetic: float32, PyTorch's own layers, forward, backward,
  Adam, the average one parameter at a time;
- "bf16": bfloat16 autocast, channels-last, forward, backward, clipping, fused AdamW, the average in
  one pass;
- "compiled": the same through ``torch.compile``, in the first row alone: compiling takes minutes;
- "ours": all of ``Trainer._train_step``, which does the same, seeds every random number by the
  picture, sums losses by noise level and looks for what is not finite. ``keep_freed_memory``, which
  ``palette train`` calls, holds for the whole process and so helps everyone;
- "floor": the network's convolutions alone, forward and backward, by PyTorch in bfloat16.

The second has the megabytes that a forward pass keeps for its backward pass, every storage once,
the float32 parameters left out. The third those by which a process of its own grows at most from
before its first step, with gradients, moments and, of "ours", the copies of the weights that it
made before; on a GPU the peak of the allocator instead, with everything. The last line is the
share of time that a run of "ours" waits for data, no worker processes helping.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from training_steps import CONTESTANTS, Ours, Step, config_of, dataset_of

from palette.data.dataset import Batches
from palette.data.loader import Loader

GPU = torch.cuda.is_available()
SIZES = [(256, 8), (128, 32), (64, 32)] if GPU else [(64, 4), (128, 2)]
NAMES = ("eager", "bf16", "ours")
TABLE = "a training step of the published network"


@pytest.fixture(autouse=True)
def _release() -> None:
    """What the test before held goes first."""
    gc.collect()


def _shape(side: int, batch: int) -> str:
    return f"{side}x{side}, batch {batch}"


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_step(benchmark, interleaved, row, side, batch) -> None:
    names = [*NAMES, "floor", *(["compiled"] if (side, batch) == SIZES[0] else [])]
    contestants = {name: CONTESTANTS[name](config_of(side, batch)) for name in names}
    found = interleaved(contestants, seconds=12.0)
    benchmark.pedantic(contestants["ours"], rounds=3)
    row(TABLE if "compiled" not in names else f"{TABLE} (all)", _shape(side, batch), 1, found)


def _kept(run: Step, parameters: list[Tensor]) -> int:
    """Bytes that the forward pass in ``run`` keeps, beside the parameters."""
    own = {value.untyped_storage().data_ptr() for value in parameters}
    storages: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        at = value.untyped_storage().data_ptr()
        if at not in own:
            storages[at] = value  # which holds it, so that no other gets its address
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        run()
    return sum(value.untyped_storage().nbytes() for value in storages.values())


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_kept_for_backward(row, side, batch) -> None:
    found = {}
    for name in NAMES:
        run = CONTESTANTS[name](config_of(side, batch))
        found[name] = float(_kept(run, run.parameters()))
    row(f"kept for the backward pass of {TABLE}", _shape(side, batch), 1, found, unit="MB")


@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_growth(row, side, batch) -> None:
    script = str(Path(__file__).with_name("training_steps.py"))
    found = {}
    for name in NAMES:
        command = [sys.executable, script, name, str(side), str(batch)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found[name] = float(ran.stdout.split()[-1])
    row(f"largest growth of a process by {TABLE}", _shape(side, batch), 1, found, unit="MB")


def test_waiting_for_data(benchmark, capsys) -> None:
    side, batch = SIZES[0]
    run = Ours(config_of(side, batch))
    run()
    order = Batches(len(dataset_of(run.trainer.config)), batch, stop=8 * batch)
    waited = 0.0
    start = last = time.perf_counter()
    for found in Loader(dataset_of(run.trainer.config), order):
        waited += time.perf_counter() - last
        run(found)
        last = time.perf_counter()
    share = waited / (last - start)
    benchmark.extra_info["share of time waiting for data"] = share
    benchmark.pedantic(run, rounds=1)
    with capsys.disabled():
        print(f"\n{_shape(side, batch)}: {100 * share:.1f} % of the time waiting for data")
