"""adamw: against the formula in float64 and PyTorch's own, bits, layouts, refusals."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palette import ops

REFERENCE = sys.modules["palette.ops.adamw"].reference
# one of several pieces, odd ones, one element, one without any
SHAPES = [(96, 64, 3, 3), (8, 4, 1, 1), (7, 5), (33,), (1,), (0, 3)]
LISTS = ("weights", "grads", "means", "squares", "steps", "averages", "copies")
OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.1,
    "limit": 3.0,
    "take": 0.25,
}


def lists(
    grads: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    copies: torch.dtype = torch.bfloat16,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> dict[str, list[Tensor]]:
    """Weights after some steps, channels-last where they have four dimensions."""
    g = torch.Generator().manual_seed(5)

    def draw(shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, generator=g).to(device)
        last = value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if last else value

    weights = [draw(shape) for shape in shapes]
    return {
        "weights": weights,
        "grads": [draw(shape).to(grads) for shape in shapes],
        "means": [0.1 * draw(shape) for shape in shapes],
        "squares": [0.1 * draw(shape).square() for shape in shapes],
        "steps": [torch.tensor(float(3 + i), device=device) for i in range(len(shapes))],
        "averages": [draw(shape) for shape in shapes],
        "copies": [
            draw(shape).to(copies) if i % 2 == 0 else torch.empty(0, dtype=copies, device=device)
            for i, shape in enumerate(shapes)
        ],
    }


def in_float64(arguments: dict[str, list[Tensor]], options: dict[str, Any]) -> dict[str, Any]:
    """The docstring's formulas on whole arrays."""
    wide = {name: [each.cpu().double() for each in found] for name, found in arguments.items()}
    norm = sum(float(each.square().sum()) for each in wide["grads"]) ** 0.5
    scale = min(1.0, options["limit"] / (norm + 1e-6)) if options["limit"] else 1.0
    beta1, beta2 = options["betas"]
    found: dict[str, Any] = {name: [] for name in LISTS if name not in ("grads", "copies")}
    for weight, grad, mean, square, step, average in zip(
        *(wide[name] for name in LISTS[:-1]), strict=True
    ):
        n, g = step + 1, grad * scale
        m, s = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
        spread = (s / (1 - beta2**n)).sqrt() + options["eps"]
        w = (1 - options["lr"] * options["weight_decay"]) * weight
        w = w - options["lr"] * (m / (1 - beta1**n)) / spread
        a = average + options["take"] * (w - average)
        for name, value in zip(found, (w, m, s, n, a), strict=True):
            found[name].append(value)
    return {**found, "norm": norm}


@pytest.mark.parametrize("limit", [0.0, 3.0, 1e6])
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_formula_in_float64(device, grads, limit) -> None:
    copies = torch.float16 if grads is torch.float16 else torch.bfloat16
    arguments, options = lists(grads, device=device, copies=copies), {**OPTIONS, "limit": limit}
    exact = in_float64(arguments, options)
    norm = ops.adamw(**arguments, **options)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(norm.item() / exact["norm"] - 1) < 1e-6
    for name in ("weights", "means", "squares", "steps", "averages"):
        for ours, wanted in zip(arguments[name], exact[name], strict=True):
            # a few roundings of numbers near 1
            torch.testing.assert_close(ours.cpu().double(), wanted, rtol=1e-6, atol=1e-6)
    for weight, low in zip(arguments["weights"], arguments["copies"], strict=True):
        assert torch.equal(low, weight.to(low.dtype)) or not low.numel()


def test_as_pytorch_has_it(device) -> None:
    """Three steps of clip_grad_norm_, AdamW and _foreach_lerp_."""
    arguments = lists(device=device, shapes=SHAPES[:-1])
    theirs = [nn.Parameter(each.clone()) for each in arguments["weights"]]
    average = [each.clone() for each in arguments["averages"]]
    options = {**OPTIONS, "limit": 0.5}
    optimizer = torch.optim.AdamW(
        theirs, lr=0.01, betas=OPTIONS["betas"], eps=1e-3, weight_decay=0.1
    )
    for name in ("means", "squares", "steps"):
        for value in arguments[name]:
            value.zero_()
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        for weight, grad in zip(theirs, arguments["grads"], strict=True):
            grad.copy_(torch.randn(grad.shape, generator=g))
            weight.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        torch._foreach_lerp_(average, [each.detach() for each in theirs], OPTIONS["take"])
        torch.testing.assert_close(ops.adamw(**arguments, **options), norm)
    for ours, wanted in zip(arguments["weights"], theirs, strict=True):
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-6, atol=1e-6)
    for ours, wanted in zip(arguments["averages"], average, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_float64_weights(device) -> None:
    arguments = {
        name: found if name in ("steps", "copies") else [each.double() for each in found]
        for name, found in lists(device=device).items()
    }
    exact = in_float64(arguments, OPTIONS)
    ops.adamw(**arguments, **OPTIONS)
    for ours, wanted in zip(arguments["weights"], exact["weights"], strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-12, atol=1e-12)


def test_without_averages_and_copies(device) -> None:
    arguments = lists(device=device)
    exact = in_float64(arguments, OPTIONS)
    kept = [each.clone() for each in arguments["averages"]]
    required = {name: arguments[name] for name in LISTS[:5]}
    ops.adamw(**required, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(arguments["averages"], kept, strict=True))
    torch.testing.assert_close(
        arguments["weights"][0].cpu().double(), exact["weights"][0], rtol=1e-6, atol=1e-6
    )
    assert ops.adamw([], [], [], [], [], lr=0.1).item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_changes_where_the_norm_is_not_finite(device, value) -> None:
    arguments = lists(device=device)
    arguments["grads"][2][-1, -1] = value if value != value else 3e38  # whose square is not
    before = copy.deepcopy(arguments)
    assert not ops.adamw(**arguments, **OPTIONS).isfinite()
    for name in LISTS:
        for ours, kept in zip(arguments[name], before[name], strict=True):
            assert torch.equal(ours.nan_to_num(7.0), kept.nan_to_num(7.0)), name


def test_same_bits_on_any_number_of_threads(device) -> None:
    first, second = lists(torch.bfloat16, device=device), lists(torch.bfloat16, device=device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.adamw(**first, **OPTIONS)
        torch.set_num_threads(4)
        four = ops.adamw(**second, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)
    for name in LISTS:
        for a, b in zip(first[name], second[name], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["grads", "means", "squares", "averages", "copies"])
def test_tensors_of_other_layouts(device, name) -> None:
    """Numbers go to where they belong, not to where memory has them; and holes stay as they are."""
    arguments = lists(device=device)
    exact = in_float64(arguments, OPTIONS)
    arguments[name][0] = arguments[name][0].contiguous()
    wide = torch.zeros(14, 5, device=device)
    wide[::2] = arguments["weights"][2]
    arguments["weights"][2] = wide[::2]
    ops.adamw(**arguments, **OPTIONS)
    for ours, wanted in zip(arguments["weights"], exact["weights"], strict=True):
        torch.testing.assert_close(ours.cpu().double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(arguments["copies"][0], arguments["weights"][0].bfloat16())
    assert not wide[1::2].any()


def test_parameters_that_require_gradients(device) -> None:
    arguments = lists(device=device)
    exact = in_float64(arguments, OPTIONS)
    arguments["weights"] = [nn.Parameter(each) for each in arguments["weights"]]
    assert not ops.adamw(**arguments, **OPTIONS).requires_grad
    torch.testing.assert_close(
        arguments["weights"][0].detach().cpu().double(), exact["weights"][0], rtol=1e-6, atol=1e-6
    )


def test_opcheck() -> None:
    arguments = lists(torch.bfloat16)
    rest = (0.01, 0.9, 0.95, 1e-3, 0.1, 3.0, 0.25)
    torch.library.opcheck(torch.ops.palette.adamw.default, (*arguments.values(), *rest))


WRONG = [
    ("grads", torch.zeros(3), ValueError, r"grads\[0\] has shape \[3\], wanted \[2, 3\]"),
    ("grads", torch.zeros(2, 3).double(), TypeError, r"grads\[0\] is float64, wanted float32 or"),
    ("means", torch.zeros(2, 3).half(), TypeError, r"means\[0\] is float16, wanted float32"),
    ("squares", torch.zeros(6), ValueError, r"squares\[0\] has shape \[6\], wanted \[2, 3\]"),
    ("steps", torch.zeros(1), ValueError, r"steps\[0\] has shape \[1\], wanted \[\]"),
    ("steps", torch.tensor(1), TypeError, r"steps\[0\] is int64, wanted float32"),
    ("averages", torch.zeros(2, 2), ValueError, r"averages\[0\] has shape \[2, 2\], wanted"),
    ("copies", torch.zeros(2, 3), TypeError, r"copies\[0\] is float32, wanted bfloat16 or float16"),
    ("copies", torch.zeros(3, 2).half(), ValueError, r"copies\[0\] has shape \[3, 2\], wanted"),
    ("weights", torch.zeros(2, 3).half(), TypeError, r"weights\[0\] is float16, wanted float32 or"),
    ("weights", 3.0, TypeError, r"weights\[0\] is float, wanted a tensor"),
    ("means", None, ValueError, r"means has 0 tensors, wanted 1 \(one per weight\)"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=[w[3] for w in WRONG])
def test_errors_name_the_argument(name, value, error, message) -> None:
    arguments = lists(shapes=[(2, 3)])
    arguments[name] = [] if value is None else [value]
    with pytest.raises(error, match="adamw: " + message):
        ops.adamw(**arguments, **OPTIONS)


@pytest.mark.parametrize("name", LISTS)
def test_the_compiled_op_refuses_by_itself(name) -> None:
    """Nothing is read or written beyond the end of a tensor, whoever calls it."""
    if "cpp" not in ops.backends("adamw"):
        return
    arguments = lists(shapes=[(2, 3)])
    arguments[name] = [torch.zeros(2, 2, dtype=arguments[name][0].dtype)]
    rest = (0.01, 0.9, 0.95, 1e-3, 0.1, 3.0, 0.25)
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.palette.adamw(*arguments.values(), *rest)
