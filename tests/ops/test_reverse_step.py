"""reverse_step: bit for bit the published order of operations, every option, errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from palette import ops

MODULE = sys.modules["palette.ops.reverse_step"]


def published(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """One sample after another, with the operations in the order of the published sampler.

    y_0 = (a * y_t - |b| * noise_hat).clamp(-1, 1); y = (c1 * y_0 + c2 * y_t) + sigma * z;
    y = known * (1 - mask) + mask * y.
    """
    get = arguments.get
    state, output, table = (get(name).cpu() for name in ("state", "output", "table"))
    step = get("step").cpu().expand(state.shape[0])
    results = {"state": [], "history": []}
    for i in range(state.shape[0]):
        a, b, c1, c2, c3, sigma = table[step[i]]
        y_t, noise_hat = state[i], output[i].float()
        y_0 = (a * y_t - (-b) * noise_hat).clamp(-1, 1)
        y = c1 * y_0 + c2 * y_t
        if get("history") is not None:
            y = y + c3 * get("history")[i].cpu()
        if get("noise") is not None:
            y = y + sigma * get("noise")[i].cpu()
        if get("seeds") is not None:
            z = ops.noise(get("seeds")[i : i + 1], int(step[i]) + 1, state.shape[1:])
            y = y + sigma * z[0].cpu()
        if get("mask") is not None:
            mask = get("mask").cpu().expand(state.shape[0], -1, -1, -1)[i]
            y = get("known")[i].cpu() * (1.0 - mask) + mask * y
        results["state"].append(y)
        results["history"].append(y_0)
    return {k: torch.stack(v) if v else torch.empty_like(state) for k, v in results.items()}


def test_equals_the_published_order(step_case, device, cases) -> None:
    arguments = step_case.arguments(device)
    wanted = published(arguments)
    changed = ("state", "history", "slot")
    before = {k: v.clone() for k, v in arguments.items() if v is not None and k not in changed}
    around = None
    if arguments["slot"] is not None:
        around = arguments["slot"]._base.clone()
    ops.reverse_step(**arguments)
    assert torch.equal(arguments["state"].cpu(), wanted["state"])
    if arguments["history"] is not None:
        assert torch.equal(arguments["history"].cpu(), wanted["history"])
    if around is not None:
        first, c = min(step_case.beside, 3), step_case.shape[1]
        written = cases.stored(wanted["state"], step_case.dtype)
        assert torch.equal(arguments["slot"].cpu(), written)
        whole = arguments["slot"]._base
        assert torch.equal(whole[:, :first], around[:, :first])
        assert torch.equal(whole[:, first + c :], around[:, first + c :])
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was changed"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "wide_rows", "transposed"])
def test_state_in_any_layout(device, cases, layout) -> None:
    arguments = cases.StepCase((2, 3, 5, 6), draw="seeds", history=True).arguments(device)
    wanted = published(arguments)
    state = cases.LAYOUTS[layout](arguments["state"])
    stride = state.stride()
    ops.reverse_step(**{**arguments, "state": state})
    assert state.stride() == stride
    assert torch.equal(state.cpu(), wanted["state"])


def test_samples_beyond_2_to_the_31(device, cases) -> None:
    case = cases.StepCase(
        (3, 3, 5, 7), torch.float16, each=True, draw="seeds", history=True, mask="full",
        slot="contiguous",
    )  # fmt: skip
    near = case.arguments(device)
    distant = {
        name: cases.far(value.clone()) if value is not None and value.dim() == 4 else value
        for name, value in near.items()
    }
    ops.reverse_step(**near)
    ops.reverse_step(**distant)
    for name in ("state", "history", "slot"):
        assert torch.equal(near[name], distant[name]), name


def test_last_step_has_no_noise_left(device, cases) -> None:
    """With sigma = 0 the given noise changes no bit."""
    arguments = cases.StepCase().arguments(device)
    arguments["step"] = torch.tensor(2, device=device)
    quiet = {**arguments, "state": arguments["state"].clone(), "noise": None}
    ops.reverse_step(**arguments)
    ops.reverse_step(**quiet)
    assert torch.equal(arguments["state"], quiet["state"])


def test_mask_of_zeros_and_ones(device, cases) -> None:
    for value in (0.0, 1.0):
        arguments = cases.StepCase(draw="seeds", mask="binary").arguments(device)
        free = {**arguments, "state": arguments["state"].clone(), "known": None, "mask": None}
        arguments["mask"].fill_(value)
        ops.reverse_step(**arguments)
        ops.reverse_step(**free)
        wanted = free["state"] if value else arguments["known"]
        assert torch.equal(arguments["state"], wanted)


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (5, 7), (2, 1, 1, 1), (1, 3, 5, 7)])
def test_mask_broadcasts(device, cases, shape) -> None:
    arguments = cases.StepCase((2, 3, 5, 7), mask="fraction").arguments(device)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device)
    full = {**arguments, "state": arguments["state"].clone()}
    full["mask"] = mask.expand(2, 3, 5, 7).contiguous()
    ops.reverse_step(**{**arguments, "mask": mask})
    ops.reverse_step(**full)
    assert torch.equal(arguments["state"], full["state"])


def test_an_image_is_the_same_alone(device, cases) -> None:
    case = cases.StepCase((3, 3, 4, 4), each=True, draw="seeds", history=True, mask="fraction")
    arguments = case.arguments(device)
    alone = {
        name: value[1:2].clone() if value is not None and name != "table" else value
        for name, value in arguments.items()
    }
    ops.reverse_step(**arguments)
    ops.reverse_step(**alone)
    assert torch.equal(alone["state"][0], arguments["state"][1])
    assert torch.equal(alone["history"][0], arguments["history"][1])


def test_same_bits_on_any_number_of_threads(device, cases) -> None:
    case = cases.StepCase((2, 3, 65, 63), draw="seeds", history=True, slot="channels_last")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        arguments = case.arguments(device)
        ops.reverse_step(**arguments)
        results.append([arguments[name] for name in ("state", "history", "slot")])
    torch.set_num_threads(before)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, each) for each in others)


def test_step_outside_the_table_is_refused(place, device, cases) -> None:
    if place[1] != "cpu" or place[0] == "triton":
        return  # on a device nobody could be told without waiting for it
    for step in (3, -1):
        arguments = cases.StepCase().arguments(device)
        arguments["step"] = torch.tensor(step)
        with pytest.raises((RuntimeError, IndexError), match=r"index|step is"):
            ops.reverse_step(**arguments)


def test_step_is_not_advanced_and_noise_follows_it(device, cases) -> None:
    arguments = cases.StepCase(draw="seeds").arguments(device)
    start, step = arguments["state"].clone(), arguments["step"]
    seen = []
    for _ in range(2):
        arguments["state"].copy_(start)
        ops.reverse_step(**arguments)
        seen.append(arguments["state"].clone())
    assert step.item() == 1
    assert torch.equal(*seen)
    arguments["table"][2] = arguments["table"][1]
    arguments["state"].copy_(start)
    step.add_(1)
    ops.reverse_step(**arguments)
    assert not torch.equal(arguments["state"], seen[0])


def test_not_a_number_is_not_hidden(device, cases) -> None:
    arguments = cases.StepCase(draw="none").arguments(device)
    arguments["output"][1, 2, 3, 4] = float("nan")
    ops.reverse_step(**arguments)
    assert arguments["state"].isnan().sum() == 1
    assert arguments["state"][1, 2, 3, 4].isnan()


@pytest.mark.parametrize("slot", ["none", "channels_last", "contiguous"])
def test_opcheck(cases, slot) -> None:
    case = cases.StepCase(
        dtype=torch.bfloat16, draw="seeds", history=True, mask="binary", slot=slot
    )  # fmt: skip
    arguments = tuple(case.arguments().values())
    torch.library.opcheck(torch.ops.palette.reverse_step.default, arguments)


def test_registered_op_equals_the_published_order(step_case) -> None:
    arguments = step_case.arguments()
    wanted = published(arguments)
    torch.ops.palette.reverse_step(**arguments)
    assert torch.equal(arguments["state"], wanted["state"])


WRONG = [
    ({"state": torch.zeros(2, 3, 4)}, ValueError, "state has shape .*, wanted \\[N, C, H, W\\]"),
    ({"state": torch.zeros(2, 3, 4, 4).half()}, TypeError, "state is float16, wanted float32"),
    ({"output": torch.zeros(2, 6, 4, 4)}, ValueError, r"output has shape \[2, 6, 4, 4\], wanted"),
    ({"table": torch.zeros(9, 5)}, ValueError, r"table has shape \[9, 5\], wanted \[S, 6\]"),
    ({"table": torch.zeros(9, 6).double()}, TypeError, "table is float64, wanted float32"),
    ({"step": 3}, TypeError, "step is int, wanted a tensor"),
    ({"step": torch.tensor(3, dtype=torch.int32)}, TypeError, "step is int32, wanted int64"),
    ({"step": torch.zeros(3).long()}, ValueError, r"step has shape \[3\], wanted \[\] or \[2\]"),
    ({"seeds": torch.zeros(3).long()}, ValueError, r"seeds has shape \[3\], wanted \[2\]"),
    (
        {"seeds": torch.zeros(2).long(), "noise": torch.zeros(2, 3, 4, 4)},
        ValueError,
        "noise and seeds are both given",
    ),
    ({"history": torch.zeros(2, 3, 4)}, ValueError, r"history has shape \[2, 3, 4\], wanted"),
    ({"mask": torch.zeros(2, 1, 4, 4)}, ValueError, "known is missing, wanted known and mask"),
    ({"known": torch.zeros(2, 3, 4, 4)}, ValueError, "mask is missing, wanted known and mask"),
    (
        {"known": torch.zeros(2, 3, 4, 4), "mask": torch.zeros(2, 1, 4, 5)},
        ValueError,
        r"mask has shape \[2, 1, 4, 5\], wanted \[2, 1, 4, 4\] or",
    ),
    ({"slot": torch.zeros(2, 4, 4, 4)}, ValueError, r"slot has shape \[2, 4, 4, 4\], wanted"),
    (
        {"output": torch.zeros(2, 3, 4, 4, requires_grad=True)},
        ValueError,
        r"requires a gradient, wanted a call under no_grad\(\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[each[2] for each in WRONG])
def test_errors_name_the_argument(change, error, message) -> None:
    arguments = {
        "state": torch.zeros(2, 3, 4, 4),
        "output": torch.zeros(2, 3, 4, 4),
        "table": torch.zeros(9, 6),
        "step": torch.tensor(0),
        **change,
    }
    with pytest.raises(error, match="reverse_step: .*" + message):
        ops.reverse_step(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"output": torch.zeros(2, 3, 4, 2)},
        {"table": torch.zeros(1, 5)},
        {"table": torch.zeros(0, 6)},
        {"step": torch.zeros(1, dtype=torch.int64)},
        {"seeds": torch.zeros(1, dtype=torch.int64)},
        {"seeds": torch.zeros(2)},
        {"history": torch.zeros(1, 3, 4, 4)},
        {"mask": torch.zeros(2, 1, 4, 3)},
        {"slot": torch.zeros(2, 2, 4, 4)},
        {"state": torch.zeros(2, 3, 4, 4).double()},
        {"state": torch.zeros(2, 3, 1, 4).expand(2, 3, 4, 4)},
        {"output": torch.zeros(2, 3, 4, 4).long()},
        {"table": torch.zeros(1, 6).double()},
        {"noise": torch.zeros(2, 3, 4, 4).half()},
        {"noise": torch.zeros(2, 3, 4, 4), "seeds": torch.zeros(2, dtype=torch.int64)},
        {"history": torch.zeros(2, 3, 4, 4).double()},
        {"history": torch.zeros(2, 1, 4, 4).expand(2, 3, 4, 4)},
        {"mask": torch.ones(2, 1, 4, 4).double()},
        {"known": None},
        {"mask": None},
        {"slot": torch.zeros(2, 3, 4, 4, dtype=torch.int32)},
        {"slot": torch.zeros(2, 3, 4, 1).expand(2, 3, 4, 4)},
    ],
    ids=lambda change: " and ".join(
        f"{name} {getattr(value, 'dtype', value)}" for name, value in change.items()
    ),
)
def test_the_compiled_op_refuses_by_itself(compiled, cases, change) -> None:
    """Nothing is read or written beyond the end of a tensor, whoever calls it."""
    state = torch.zeros(2, 3, 4, 4)
    every = {"state": state, "output": state.clone(), "table": torch.zeros(1, 6)}
    every |= {"step": torch.tensor(0), "seeds": None, "noise": None, "history": None}
    every |= {"known": state.clone(), "mask": torch.ones(2, 1, 4, 4), "slot": None}
    torch.ops.palette.reverse_step(*cases.on(compiled, every).values())
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.palette.reverse_step(*cases.on(compiled, {**every, **change}).values())
