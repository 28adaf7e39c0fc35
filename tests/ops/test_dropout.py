"""dropout: every bit against the counter layout, the seeds kept and not the mask, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from palette import _extension, ops
from palette.ops import philox

REFERENCE = sys.modules["palette.ops.dropout"].reference


def draws_of(seeds: Tensor, shape: tuple[int, ...], layer: int) -> Tensor:
    """The uniform number of every element [N, *shape], by NumPy from Philox's words."""
    words = philox.words(seeds.cpu(), int(np.prod(shape)), stream=3, layer=layer).numpy()
    draws = words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    return torch.from_numpy(draws).reshape(len(seeds), *shape)


def exactly(arguments: dict, cases) -> Tensor:
    """What dropout must give, bit for bit."""
    x, p = arguments["x"].detach().cpu(), arguments["p"]
    number = np.float64 if x.dtype == torch.float64 else np.float32
    draws = draws_of(arguments["seeds"], tuple(x.shape[1:]), arguments["layer"])
    kept = draws.numpy() >= np.float32(p)
    product = x.to(torch.float64).numpy().astype(number) * number(1 / (1 - p))
    return cases.stored(torch.from_numpy(np.where(kept, product, number(0))), x.dtype)


def test_every_bit(drop_case, device, cases) -> None:
    arguments = drop_case.arguments(device)
    y = ops.dropout(**arguments)
    assert y.dtype == drop_case.dtype
    assert torch.equal(y.cpu(), exactly(arguments, cases))
    wanted = sys.modules["palette.ops._layout"].empty_like(arguments["x"])
    assert cases.strides(y) == cases.strides(wanted)


@pytest.mark.parametrize("name", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_close_to_float64(device, within, cases, name, layout) -> None:
    dtype = getattr(cases, name)
    arguments = cases.DropCase((2, 12, 6, 6), dtype, layout).arguments(device)
    wide = {**arguments, "x": arguments["x"].cpu().double(), "seeds": arguments["seeds"].cpu()}
    factor = 4 if dtype.itemsize >= 4 else 1.05  # 1 / (1 - p) is rounded too
    within(ops.dropout(**arguments), REFERENCE(**wide), dtype, factor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_is_dropped_alike(device, cases, layout) -> None:
    """Whatever the layout of the gradient, expanded ones too; and again for its own gradient."""
    arguments = cases.DropCase((2, 24, 4, 6), torch.float32, layout).arguments(device)
    x = arguments["x"].requires_grad_()
    y = ops.dropout(**arguments)
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    for name, make in cases.LAYOUTS.items():
        grad = make(normal).requires_grad_()
        (gradient,) = torch.autograd.grad(y, x, grad, create_graph=True)
        same = exactly({**arguments, "x": grad}, cases)
        assert torch.equal(gradient.detach().cpu(), same), name
        if ops.choose("dropout", device) != "reference":
            assert cases.strides(gradient) == cases.strides(y), name
        (again,) = torch.autograd.grad(gradient, grad, normal)
        assert torch.equal(again.cpu(), exactly({**arguments, "x": normal}, cases)), name


def test_only_the_seeds_are_kept(device, cases) -> None:
    arguments = cases.DropCase((2, 24, 4, 6)).arguments(device)
    arguments["x"].requires_grad_()
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        ops.dropout(**arguments)
    if ops.choose("dropout", device) != "reference":  # which is differentiated step by step
        assert [value.shape for value in kept] == [(2,)]
        assert torch.equal(kept[0], arguments["seeds"])


def test_gradcheck() -> None:
    seeds = torch.tensor([3, -4])
    for backend in ops.backends("dropout"):
        if backend not in ("reference", "cpp"):
            continue
        for layout in ({}, {"memory_format": torch.channels_last}):
            x = torch.randn(2, 3, 2, 2, dtype=torch.float64).contiguous(**layout).requires_grad_()
            with ops.use(backend):
                assert torch.autograd.gradcheck(lambda x: ops.dropout(x, seeds, 0.4, 1), x)
                assert torch.autograd.gradgradcheck(lambda x: ops.dropout(x, seeds, 0.4, 1), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kept_from_exactly_p_on(device, cases, layout) -> None:
    """An element whose own number is p stays; with the next float32 as p it goes.

    The smallest numbers are those of one word each.
    """
    seeds = torch.tensor([11], device=device)
    x = cases.LAYOUTS[layout](torch.ones(1, 8, 16, 16, device=device))
    draws = draws_of(seeds, (8, 16, 16), 2)[0]
    ordered = [np.unravel_index(at, draws.shape) for at in draws.flatten().argsort().tolist()]
    for at in (*ordered[:3], ordered[300], ordered[1024], ordered[-1]):
        number = draws[tuple(at)].numpy()
        above = np.nextafter(number, np.float32(2))
        # p rounds to these numbers; it need not be one of them
        near = float(number) - float(above - number) / 8
        for p, stays in ((float(number), True), (near, True), (float(above), False)):
            assert bool(ops.dropout(x, seeds, p, 2)[(0, *at)] != 0) == stays


def test_dropped_numbers_are_zero_whatever_they_were(device) -> None:
    seeds = torch.tensor([1, 2], device=device)
    one = ops.dropout(torch.ones(2, 8, 4, 4, device=device), seeds, 0.5, 0)
    for value in (float("nan"), float("inf"), -0.0):
        y = ops.dropout(torch.full((2, 8, 4, 4), value, device=device), seeds, 0.5, 0)
        assert torch.equal(y[one == 0], torch.zeros_like(y[one == 0]))
        assert not y[one == 0].signbit().any()
        assert torch.equal(torch.nan_to_num(y[one != 0], 5), torch.full_like(
            y[one != 0], torch.nan_to_num(torch.tensor(value), 5).item()))  # fmt: skip


def test_share(device, cases) -> None:
    for p in (0.1, 0.5, 0.9):
        y = ops.dropout(torch.ones(2, 16, 32, 32, device=device), torch.arange(2).to(device), p, 0)
        dropped = (y == 0).double().mean().item()
        assert abs(dropped - p) < 4 * (p * (1 - p) / y.numel()) ** 0.5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_is_the_same_alone(device, cases, layout) -> None:
    arguments = cases.DropCase((4, 24, 6, 6), torch.bfloat16, layout).arguments(device)
    both = ops.dropout(**arguments)
    alone = {**arguments, "x": arguments["x"][2:3], "seeds": arguments["seeds"][2:3]}
    assert torch.equal(ops.dropout(**alone)[0], both[2])
    wide = torch.stack((arguments["seeds"], arguments["seeds"] + 1), 1)
    assert torch.equal(ops.dropout(**{**arguments, "seeds": wide[:, 0]}), both)


@pytest.fixture
def threads() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


def test_same_bits_on_any_number_of_threads(device, cases, threads) -> None:
    for layout in ("contiguous", "channels_last"):
        arguments = cases.DropCase((2, 65, 12, 11), torch.float16, layout).arguments(device)
        made = []
        for number in threads:
            torch.set_num_threads(number)
            made.append(ops.dropout(**arguments))
        assert all(torch.equal(each, made[0]) for each in made)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_bits(isa) -> None:
    """In a process told which set to use; the widest is that of all other tests."""
    if "cpp" not in ops.backends("dropout") or isa not in (
        "baseline",
        *_extension.instruction_sets(),
    ):
        return
    code = """
import sys, torch, palette.ops
reference = sys.modules["palette.ops.dropout"].reference
for shape in ((2, 37, 4, 6), (2, 128, 4, 4), (1, 5, 7, 9)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for size in (1.0, 1e-39, 1e-7):
            values = (torch.randn(shape) * size).to(dtype)
            for x in (values, values.contiguous(memory_format=torch.channels_last)):
                given = (x, torch.tensor([1, -2])[: len(x)], 0.3, 4)
                assert torch.equal(palette.ops.dropout(*given), reference(*given)), (shape, dtype)
"""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PALETTE_CPU_ISA": isa, "PALETTE_BACKEND": "cpp"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_beyond_2_to_the_31(device, cases, layout) -> None:
    near = cases.DropCase((3, 4, 4, 6), torch.float16, layout).arguments(device)
    distant = {**near, "x": cases.far(near["x"].clone())}
    assert torch.equal(ops.dropout(**distant), ops.dropout(**near))


def test_opcheck(cases) -> None:
    for layout in ("channels_last", "transposed"):
        arguments = cases.DropCase((2, 8, 3, 4), layout=layout).arguments()
        arguments["x"].requires_grad_()
        torch.library.opcheck(torch.ops.palette.dropout.default, tuple(arguments.values()))


WRONG = [
    ({"x": 5}, TypeError, "x is int, wanted a tensor"),
    ({"x": torch.ones(2, 3).long()}, TypeError, "x is int64, wanted float32 or bfloat16"),
    ({"x": torch.ones(2)}, ValueError, r"x has shape \[2\], wanted \[N, C, \.\.\.\]"),
    (
        {"x": torch.ones(2, 1).expand(2, 2**34 + 1)},
        ValueError,
        r"x has shape .*, wanted at most 2\^34",
    ),
    ({"seeds": torch.ones(2)}, TypeError, "seeds is float32, wanted int64"),
    ({"seeds": torch.tensor([1])}, ValueError, r"seeds has shape \[1\], wanted \[2\]"),
    ({"seeds": torch.ones(2, device="meta").long()}, ValueError, "seeds is on meta, wanted cpu"),
    ({"p": 1}, ValueError, r"p is 1, wanted a number in \[0, 1\)"),
    ({"p": -0.1}, ValueError, r"p is -0\.1, wanted"),
    ({"p": float("nan")}, ValueError, "p is nan, wanted"),
    ({"p": "0.1"}, TypeError, r"p is '0\.1', wanted a number"),
    ({"layer": 2**32}, ValueError, r"layer is 4294967296, wanted a number in \[0, 2\^32\)"),
    ({"layer": 1.0}, TypeError, r"layer is 1\.0, wanted an integer"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[each[2] for each in WRONG])
def test_errors_name_the_argument(change, error, message) -> None:
    arguments = {"x": torch.ones(2, 3), "seeds": torch.tensor([1, 2]), "p": 0.1, "layer": 0}
    with pytest.raises(error, match="dropout: " + message):
        ops.dropout(**{**arguments, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": torch.zeros(3, dtype=torch.int64)},
        {"seeds": torch.zeros(2, 1, dtype=torch.int64)},
        {"seeds": torch.zeros(2)},
        {"x": torch.zeros(2)},
    ],
    ids=str,
)
def test_the_compiled_op_refuses_by_itself(compiled, cases, change) -> None:
    """Nothing is read beyond the end of a tensor, whoever calls it."""
    every = {"x": torch.zeros(2, 8, 4, 4), "seeds": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.palette.dropout(*cases.on(compiled, every).values(), 0.5, 1)
