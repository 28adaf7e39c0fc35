"""Any arguments: valid ones are held against float64, wrong ones get one line that names them.

Fifty examples of each test in the suite; thousands, other ones every time, in ``make soak``, which
also runs the suite's in Triton's interpreter.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from palette import ops

CASES = sys.modules["palette_op_cases"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = sorted(CASES.LAYOUTS)

# Roundings to the dtype of a result: the kernels' own bounds with room for groups of a few numbers.
FORWARD = {torch.float32: 16.0, torch.float64: 16.0, torch.bfloat16: 1.1, torch.float16: 1.1}


def places(op: str) -> st.SearchStrategy[tuple[str, str]]:
    """(backend, device)."""
    return st.sampled_from(CASES.places(op))


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def chance(value: Any) -> st.SearchStrategy[Any]:
    """``value`` or nothing."""
    return st.sampled_from([value, None])


@st.composite
def tensors(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, centre: float = 0.0
) -> Tensor:
    """Normal numbers around ``centre``, in any layout that the shape has."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = (centre + torch.randn(shape, generator=g)).to(dtype)
    layouts = ["contiguous", "offset"] if len(shape) < 3 else LAYOUTS
    return CASES.LAYOUTS[draw(st.sampled_from(layouts))](values)


@st.composite
def norms(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of group_norm_silu."""
    groups, members = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    n, c = draw(st.integers(0, 4)), groups * members
    shape = (n, c, *draw(st.lists(st.integers(0, 19), max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    affine, film = (draw(st.sampled_from([dtype, torch.float32])) for _ in range(2))
    return {
        "x": draw(tensors(shape, dtype, draw(st.sampled_from([0.0, -0.3, 30.0])))),
        "weight": draw(chance(draw(tensors((c,), affine, 1.0)))),
        "bias": draw(chance(draw(tensors((c,), affine)))),
        "groups": groups,
        "eps": draw(st.sampled_from([1e-5, 1e-6, 1e-2, 1])),
        "scale": draw(chance(draw(tensors((n, c), film)))),
        "shift": draw(chance(draw(tensors((n, c), film)))),
        "silu": draw(st.booleans()),
    }


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of attention."""
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    spatial = draw(st.lists(st.integers(0, 20), min_size=1, max_size=2))
    shape = (draw(st.integers(0, 3)), 3 * heads * size, *spatial)
    return {
        "qkv": draw(tensors(shape, draw(st.sampled_from(DTYPES)))),
        "heads": heads,
        "order": draw(st.sampled_from(["legacy", "new"])),
    }


@st.composite
def dropouts(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of dropout."""
    seeds = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
    shape = (len(seeds), *draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)))
    return {
        "x": draw(tensors(shape, draw(st.sampled_from(DTYPES)))),
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "p": draw(st.floats(0, 1, exclude_max=True)),
        "layer": draw(st.integers(0, 2**32 - 1)),
    }


@st.composite
def noises(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of noise."""
    seeds = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
    word = st.integers(0, 2**32 - 1)
    steps = st.lists(word, min_size=len(seeds), max_size=len(seeds)).map(torch.tensor)
    steps = steps.map(torch.Tensor.long)
    return {
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "step": draw(st.one_of(word, word.map(torch.tensor), steps)),
        "shape": tuple(draw(st.lists(st.integers(0, 40), max_size=3))),
        "stream": draw(word),
        "layer": draw(word),
    }


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of reverse_step."""
    shape = tuple(draw(st.integers(low, 7)) for low in (0, 1, 0, 0))
    dtype = torch.float32
    draws = draw(st.sampled_from(["seeds", "noise", None]))
    rows = draw(st.integers(1, 4))
    own = [each for each in LAYOUTS if each != "expanded"]

    def changed() -> Tensor:
        g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        return CASES.LAYOUTS[draw(st.sampled_from(own))](torch.randn(shape, generator=g))

    sizes = (st.sampled_from([1, each]) for each in shape)
    hole = tuple(draw(each) for each in sizes)[draw(st.integers(0, 4)) :]
    masked = draw(st.booleans())
    each = draw(st.booleans())
    return {
        "state": changed(),
        "output": draw(tensors(shape, draw(st.sampled_from(DTYPES)))),
        "table": draw(tensors((rows, 6), dtype)),
        "step": torch.arange(shape[0]) % rows if each else torch.tensor(rows - 1),
        "seeds": torch.arange(shape[0]) - 5 if draws == "seeds" else None,
        "noise": draw(tensors(shape, dtype)) if draws == "noise" else None,
        "history": draw(chance(changed())),
        "known": draw(tensors(shape, dtype)) if masked else None,
        "mask": draw(tensors(hole, dtype)).abs() if masked else None,
        "slot": draw(chance(changed().to(draw(st.sampled_from(DTYPES))))),
    }


VALID = {
    "attention": attentions(),
    "dropout": dropouts(),
    "group_norm_silu": norms(),
    "noise": noises(),
    "reverse_step": steps(),
}


def exactly(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def reference(op: str, arguments: dict[str, Any]) -> Any:
    return sys.modules[f"palette.ops.{op}"].reference(**arguments)


@given(norms(), places("group_norm_silu"))
def test_group_norm_silu(within, arguments, place) -> None:
    backend, device = place
    tensors = [n for n, value in arguments.items() if isinstance(value, Tensor)]
    arguments, wide = moved(arguments, device), exactly(arguments)
    for each in (arguments, wide):
        each.update({name: each[name].detach().requires_grad_() for name in tensors})
    with ops.use(backend):
        y = ops.group_norm_silu(**arguments)
    exact = reference("group_norm_silu", wide)
    conditioning = CASES.conditioning(arguments)
    factor = FORWARD[y.dtype] * conditioning
    within(y, exact, y.dtype, factor, "y")
    grad = torch.sin(torch.arange(y.numel())).reshape(y.shape).to(y.dtype)
    y.backward(grad.to(device))
    exact.backward(grad.double())
    if y.numel() == 0:
        return
    x = wide["x"].detach().reshape(y.shape[0], arguments["groups"], -1)
    # a gradient that cancels is measured like the terms that do
    steep = (x.var(-1, correction=0) + arguments["eps"]).rsqrt().max() * grad.double().norm()
    for name in tensors:
        value, wanted = arguments[name].grad, wide[name].grad
        beside = steep * (4 if name == "x" else y[0, 0].numel() ** 0.5)
        lost = 8 if value.dtype == torch.float32 else 2
        within(value, wanted, value.dtype, lost * factor, name, beside)


@given(attentions(), places("attention"))
def test_attention(within, arguments, place) -> None:
    backend, device = place
    arguments, wide = moved(arguments, device), exactly(arguments)
    for each in (arguments, wide):
        each["qkv"] = each["qkv"].detach().requires_grad_()
    with ops.use(backend):
        out = ops.attention(**arguments)
    exact = reference("attention", wide)
    rounds_weights = backend in ("sdpa", "cuda", "triton") or CASES.EMULATED
    factor = 32.0 if out.dtype.itemsize >= 4 else 4.0 if rounds_weights else 1.1
    within(out, exact, out.dtype, factor, "out")
    out.backward(torch.ones_like(out))
    exact.backward(torch.ones_like(exact))
    within(arguments["qkv"].grad, wide["qkv"].grad, out.dtype, 4 * factor, "qkv")


@given(dropouts(), places("dropout"))
def test_dropout(arguments, place) -> None:
    backend, device = place
    wanted = reference("dropout", arguments)
    local = moved(arguments, device)
    x = local["x"].detach().requires_grad_()
    with ops.use(backend):
        y = ops.dropout(**{**local, "x": x})
    assert torch.equal(y.cpu(), wanted)
    y.backward(torch.ones_like(y))
    ones = torch.ones_like(arguments["x"])
    assert torch.equal(x.grad.cpu(), reference("dropout", {**arguments, "x": ones}))


@given(noises(), places("noise"))
def test_noise(arguments, place) -> None:
    backend, device = place
    with ops.use(backend):
        z = ops.noise(**moved(arguments, device))
    wanted = reference("noise", arguments)
    assert z.shape == wanted.shape
    assert torch.allclose(z.cpu(), wanted, rtol=1e-6, atol=0)


@given(steps(), places("reverse_step"))
def test_reverse_step(arguments, place) -> None:
    backend, device = place
    same = {name: value if value is None else value.clone() for name, value in arguments.items()}
    reference("reverse_step", same)
    arguments = moved(arguments, device)
    with ops.use(backend):
        ops.reverse_step(**arguments)
    for name in ("state", "history", "slot"):
        if arguments[name] is not None:
            tolerance = 1e-5 if arguments[name].dtype.itemsize >= 4 else 1e-2  # of the noise
            assert torch.allclose(arguments[name].cpu(), same[name], rtol=tolerance, atol=tolerance)


def wrong_tensors(name: str, value: Tensor) -> list[Any]:
    """What may not stand in the place of a tensor."""
    elsewhere = [] if name in ("x", "qkv", "seeds", "state") else [value.to("meta")]
    flat = name in ("x", "qkv")  # which take more than one number of dimensions
    return [
        *elsewhere,
        3.0,
        "tensor",
        [1.0],
        value.to(torch.complex64),
        value.to(torch.int16),
        value.bool(),
        value.new_zeros(()) if flat else value.new_zeros((*value.shape, 97)),
        value.to_sparse(),
    ]


WRONG_NUMBERS = {
    "groups": [0, -1, 2**70, 2.0, "4", None, math.nan, torch.ones(2)],
    "heads": [0, -3, 10**9, 2**70, 2.0, "4", None, torch.ones(2)],
    "eps": [-1e-5, math.nan, math.inf, "small", None],
    "silu": ["yes", None, 1.0],
    "order": ["old", "", None, 3, ["new"]],
    "step": [-1, 2**32, 1.5, "3", None, math.nan],
    "stream": [-1, 2**32, 1.5, "3", None],
    "p": [-1e-9, 1, 1.0, math.nan, math.inf, "0.1", None, torch.ones(2)],
    "layer": [-1, 2**32, 1.5, "3", None],
    "shape": [3, None, (-1,), (2.0,), "34", (2**40,), (2**20, 2**20), (None,)],
}
MUTABLE = ("state", "history", "slot")


@pytest.mark.parametrize("op", VALID)
@given(data=st.data())
def test_wrong_arguments(op, data) -> None:
    """One wrong argument among valid ones is named in one line, whatever the backend."""
    arguments = data.draw(VALID[op])
    name = data.draw(st.sampled_from(sorted(k for k, v in arguments.items() if v is not None)))
    value = arguments[name]
    if not isinstance(value, Tensor):
        arguments[name] = data.draw(st.sampled_from(WRONG_NUMBERS[name]))
    elif name in MUTABLE and value.numel() > 1 and data.draw(st.booleans()):
        arguments[name] = value[:1, :1, :1, :1].expand(value.shape)
    else:
        arguments[name] = data.draw(st.sampled_from(wrong_tensors(name, value)))
    backend, _ = data.draw(places(op))
    with ops.use(backend), pytest.raises((ValueError, TypeError)) as caught:
        getattr(ops, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    assert "wanted" in message
    assert name in message
    assert "\n" not in message
