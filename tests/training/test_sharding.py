"""FSDP2: the losses of one process from half of the memory each, and the same checkpoints."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from palette import checkpoint as checkpoints
from palette.build import build_network
from palette.config import ConfigError, from_yaml
from palette.training.distributed import World
from palette.training.sharding import load_optimizer, own_part

SHARED = (
    "model.dropout=0.2",
    "train.keep=100",
    "train.ema_decays=[0.5]",
    "train.swa_start=3",
    "train.steps=6",
    "train.save_every=2",
)
SHARDED = (*SHARED, "train.parallel=fsdp", "train.accumulate=2")
NAMES = ("loss", "loss_level_1", "loss_level_4", "grad_norm", "validation_loss", "validation_mae")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics(run) if name in line]


def shapes(value: Any) -> Any:
    """The structure of a checkpoint's part, with types and shapes in place of numbers."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, dict):
        return {key: shapes(inner) for key, inner in value.items()}
    return type(value)


class Messages(TorchDispatchMode):
    """Counts the messages by which gradients are shared out."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in str(op)
        return op(*args, **(kwargs or {}))


def report_of(trainer: Any, messages: int) -> dict[str, Any]:
    """What one rank holds, and what it sent."""
    slots = trainer.optimizer.state_dict()["state"].values()
    kept = {
        "weights": list(trainer.network.parameters()),
        "average": list(trainer.ema.network.parameters()),
        "moments": [slot["exp_avg"] for slot in slots],
    }
    shares = {
        name: sum(own_part(value).numel() for value in values) / sum(v.numel() for v in values)
        for name, values in kept.items()
    }
    return {"shares": shares, "messages": messages, "units": len(trainer.network.units()) + 1}


def test_one_process_and_two_sharded_ones_take_turns(
    tmp_path: Path, tiny: ModuleType, two: ModuleType
) -> None:
    """Steps 1 and 2 on one, 3 and 4 on two with a validation, 5 and 6 on one."""
    sets = ("train.sample_every=4",)
    one, run = tmp_path / "one", tmp_path / "run"
    tiny.build(one, (*SHARED, *sets)).fit()
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(one / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000002")
    shutil.copy(one / "metrics.jsonl", run)

    def train(here: World) -> None:
        trainer = tiny.build(run, (*SHARDED, *sets, "train.steps=4"), here)
        with Messages() as sent:
            trainer.fit("auto")
        (tmp_path / f"{here.rank}.json").write_text(json.dumps(report_of(trainer, sent.count)))

    assert two.in_two(train) == [0, 0]
    tiny.build(run, (*SHARED, *sets)).fit("auto")
    for name in NAMES:
        (steps, expected), (found_steps, found) = (
            zip(*curve(place, name), strict=True) for place in (one, run)
        )
        assert found_steps == steps
        assert found == pytest.approx(expected, rel=1e-4), name
    for step in ("step_00000004", "step_00000006"):
        there, here = (checkpoints.load(place / "checkpoints" / step) for place in (one, run))
        for part in ("model", "ema", "averages"):
            assert shapes(getattr(here, part)) == shapes(getattr(there, part))
        assert shapes(here.trainer) == shapes(there.trainer)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, share in seen["shares"].items():
            assert share == pytest.approx(0.5, abs=0.01), name
        assert seen["messages"] == 2 * seen["units"]  # in 2 steps of 2 backward passes


@pytest.mark.soak
def test_a_killed_sharded_run_goes_on_to_the_bit(
    tmp_path: Path, tiny: ModuleType, two: ModuleType
) -> None:
    """Rank 1 is killed in step 5; in step 2 it alone has numbers that are none."""
    sets = (*SHARDED, "model.checkpoint=true", "train.sample_every=0")

    def train(run: Path, kill: bool) -> list[int]:
        def on(here: World) -> None:
            trainer = tiny.build(run, sets, here)

            def disturb(keys: Any, entries: Any) -> None:
                if here.rank == 1 and trainer.step == 1:
                    entries[0]["target"] = torch.full_like(entries[0]["target"], float("nan"))
                if here.rank == 1 and kill and trainer.step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)

            trainer.dataset.disturb = disturb
            trainer.fit("auto")

        codes: list[int] = two.in_two(on)
        return codes

    straight, run = tmp_path / "straight", tmp_path / "run"
    assert train(straight, kill=False) == [0, 0]
    assert train(run, kill=True) == [1, -signal.SIGKILL]
    assert checkpoints.latest(run).step == 4
    assert train(run, kill=False) == [0, 0]
    for name in NAMES:
        assert curve(run, name) == curve(straight, name)
    assert dict(curve(run, "loss"))[2] is None
    assert json.loads((run / "skipped.jsonl").read_text())["step"] == 2
    ours, theirs = (checkpoints.latest(place) for place in (run, straight))
    weights = [name for name in ours.meta["files"] if name.endswith(".safetensors")]
    assert len(weights) == 4
    for name in weights:
        assert ours.meta["files"][name]["sha256"] == theirs.meta["files"][name]["sha256"]
    moments = [found.trainer["optimizer"]["state"] for found in (ours, theirs)]
    assert all(
        torch.equal(value, moments[1][number][name])
        for number, slot in moments[0].items()
        for name, value in slot.items()
    )


def test_accumulation_sends_gradients_once_a_step(tmp_path: Path, tiny: ModuleType) -> None:
    """DDP; what FSDP sends is counted above."""
    sets = ("train.accumulate=4", "train.steps=2", "train.sample_every=0")
    sent: list[tuple[int, int]] = []

    def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append((trainer.step, bucket.index()))
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = tiny.build(tmp_path, sets)
        trainer.model = DistributedDataParallel(trainer.network, bucket_cap_mb=0.1)
        trainer.model.register_comm_hook(None, count)
        trainer.fit()
    finally:
        dist.destroy_process_group()
    assert sent[0] == (0, 0)
    assert len(set(sent)) == len(sent) > 2  # after the first step DDP makes its buckets anew


def test_moments_are_laid_out_as_their_parameters(tiny: ModuleType) -> None:
    """Those of a published run, or of a sharded one, are contiguous; our weights are not."""
    stepped = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(torch.arange(54.0).reshape(2, 3, 3, 3))
        weight.data = weight.data.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW([weight], fused=True)
        moment = torch.arange(54.0).reshape(2, 3, 3, 3).to(memory_format=layout)
        slot = {"step": torch.tensor(5.0), "exp_avg": moment, "exp_avg_sq": moment.square() + 1}
        load_optimizer(optimizer, {**optimizer.state_dict(), "state": {0: slot}}, {"w": weight})
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        stepped.append(weight.detach())
    assert torch.equal(*stepped)


@pytest.mark.parametrize("kind", ["unet", "sr3"])
def test_the_units_share_no_weight_and_run_as_one(tiny: ModuleType, kind: str) -> None:
    config = from_yaml(tiny.OPTIONS, overrides=[f"model.kind={kind}"])
    network = build_network(config)
    projections, *blocks = network.units()
    inside = {parameter for layer in projections for parameter in layer.parameters()}
    assert inside
    assert all(len(block) == 1 for block in blocks)
    entered: list[Any] = []
    for unit in (projections, *blocks):
        unit[0].register_forward_pre_hook(lambda layer, _: entered.append(layer))
    network(torch.zeros(1, 6, 16, 16), torch.ones(1))
    assert entered == [projections[0], *(block[0] for block in blocks)]


def test_float16_is_not_sharded(tmp_path: Path, tiny: ModuleType) -> None:
    here = World(0, 2, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"parallel=fsdp goes with train\.precision=bfloat16"):
        tiny.build(tmp_path, (*SHARDED, "train.precision=float16"), here)
