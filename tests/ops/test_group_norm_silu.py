"""group_norm_silu: every backend against float64 on every case, gradients, layouts, errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from palette import ops
from palette.ops import _layout

MODULE = sys.modules["palette.ops.group_norm_silu"]
TENSORS = ("x", "weight", "bias", "scale", "shift")
conditioning = sys.modules["palette_op_cases"].conditioning

# Allowed error in roundings to the result's dtype. Half formats: the one rounding of the result and
# little else. float32: the sums and some ten operations.
FORWARD = {torch.float32: 8.0, torch.float64: 8.0, torch.bfloat16: 1.05, torch.float16: 1.05}
BACKWARD = {torch.float32: 16.0, torch.float64: 16.0, torch.bfloat16: 1.05, torch.float16: 1.05}


def exactly(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on the CPU in float64."""
    return {
        name: value.detach().cpu().double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with gradients wanted for every tensor."""
    return {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def test_reference_states_the_published_op(cases) -> None:
    """As a residual block writes it: GroupNorm, * (1 + scale) + shift, SiLU."""
    case = cases.NormCase(
        (2, 8, 3, 5), 4, torch.float64, "contiguous", torch.float64, torch.float64
    )
    arguments = case.arguments()
    norm = torch.nn.GroupNorm(4, 8, eps=1e-5, dtype=torch.float64)
    norm.weight.data, norm.bias.data = arguments["weight"], arguments["bias"]
    scale, shift = (arguments[name][:, :, None, None] for name in ("scale", "shift"))
    y = norm(arguments["x"]) * (1 + scale) + shift
    wanted = y * torch.sigmoid(y)
    assert torch.allclose(MODULE.reference(**arguments), wanted, rtol=1e-12, atol=1e-14)
    assert torch.allclose(MODULE.reference(**{**arguments, "silu": False}), y, rtol=1e-12)


def test_forward(norm_case, device, cases, within) -> None:
    arguments = norm_case.arguments(device)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    y = ops.group_norm_silu(**arguments)
    exact = MODULE.reference(**exactly(arguments))
    assert y.dtype == norm_case.dtype
    assert cases.strides(y) == cases.strides(_layout.empty_like(arguments["x"]))
    within(y, exact, y.dtype, FORWARD[y.dtype] * conditioning(arguments))
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was changed"


def test_backward(norm_case, device, within) -> None:
    arguments = leaves(norm_case.arguments(device))
    y = ops.group_norm_silu(**arguments)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=g).to(y.dtype)
    y.backward(grad.to(device))
    exact = leaves(exactly(arguments))
    MODULE.reference(**exact).backward(grad.double())
    for name in TENSORS:
        value = arguments[name]
        if value is None:
            continue
        assert value.grad.dtype == value.dtype
        factor = BACKWARD[value.dtype] * conditioning(arguments)
        if value.dtype == torch.float32 and norm_case.dtype in (torch.bfloat16, torch.float16):
            factor *= 4  # with half inputs a kernel's exponential may be good to 20 bits only
        # Where a group is constant the gradients of weight and scale are rounding around zero: they
        # are measured like those of bias and shift, which the same terms make without x^.
        beside = exact[{"weight": "bias", "scale": "shift"}.get(name, name)].grad
        within(value.grad, exact[name].grad, value.dtype, factor, name, beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_near_the_largest_number(device, dtype) -> None:
    bias = torch.tensor([3e38, -3e38, 1e38, -1e38] * 2, device=device).to(dtype)
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        y = ops.group_norm_silu(x, torch.ones_like(bias), bias, 4)
        assert torch.equal(y, bias.relu().reshape(1, 8, 1, 1).expand_as(y))


@pytest.mark.parametrize("seed", range(8))
def test_an_outlier_costs_no_digits(device, within, seed) -> None:
    """Whatever sums begin with: a shift that it had a part in would be far from the rest."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 32, 16, 16, generator=g), torch.rand(32, generator=g) + 0.5
    x[0, 0, 0, 0] = 1e4
    exact = MODULE.reference(x.double(), weight.double(), None, 8)
    y = ops.group_norm_silu(
        x.to(device, memory_format=torch.channels_last), weight.to(device), None, 8
    )
    within(y, exact, x.dtype, FORWARD[x.dtype])


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_formula(within, cases, dtype, silu) -> None:
    """The registered backward where nothing is compiled, against autograd of the reference."""
    case = cases.NormCase((2, 12, 3, 5), 4, dtype, "channels_last", dtype, dtype, silu)
    arguments = leaves(case.arguments())
    exact = leaves(exactly(arguments))
    y, mean, rstd = MODULE._forward(**arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    MODULE.reference(**exact).backward(grad.double())
    plain = {name: arguments[name].detach() for name in TENSORS}
    grads = MODULE._backward(
        grad, plain["x"], mean, rstd, plain["weight"], plain["bias"], 4, plain["scale"],
        plain["shift"], silu,
    )  # fmt: skip
    for name, value in zip(TENSORS, grads, strict=True):
        within(value, exact[name].grad, dtype, BACKWARD[dtype], name)


@pytest.mark.parametrize("wanted", [{name} for name in TENSORS] + [{"x", "scale"}])
def test_each_gradient_alone(device, cases, within, wanted) -> None:
    case = cases.NormCase((2, 12, 3, 5), 4, layout="channels_last", film=torch.float32)
    arguments, exact = case.arguments(device), exactly(case.arguments())
    for name in wanted:
        arguments[name].requires_grad_()
        exact[name].requires_grad_()
    ops.group_norm_silu(**arguments).sum().backward()
    MODULE.reference(**exact).sum().backward()
    for name in TENSORS:
        if name in wanted:
            within(arguments[name].grad, exact[name].grad, torch.float32, 48, name)
        else:
            assert arguments[name].grad is None


@pytest.mark.parametrize("missing", ["weight", "bias", "scale", "shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_one_missing(device, cases, within, dtype, missing) -> None:
    case = cases.NormCase((2, 12, 3, 5), 4, dtype, "channels_last", dtype, dtype)
    arguments = leaves({**case.arguments(device), missing: None})
    y = ops.group_norm_silu(**arguments)
    exact = leaves(exactly(arguments))
    wanted = MODULE.reference(**exact)
    within(y, wanted, y.dtype, FORWARD[y.dtype])
    y.sum().backward()
    wanted.sum().backward()
    for name in set(TENSORS) - {missing}:
        within(arguments[name].grad, exact[name].grad, dtype, 48, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("positions", [1, 41, 83, 1681])  # n * (1 / n) is not 1
def test_a_constant_group_is_exact(device, cases, layout, positions) -> None:
    """Of however many parts its mean is made, no deviation is left to be blown up by rstd."""
    x = cases.LAYOUTS[layout](torch.full((1, 24, positions), 3.0, device=device))
    bias = torch.linspace(-1, 1, 24, device=device)
    y = ops.group_norm_silu(x, None, bias, 8, silu=False)
    assert torch.equal(y, bias.reshape(1, -1, 1).expand(x.shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "wide_rows"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
def test_gradient_in_any_layout(device, cases, within, x_layout, layout) -> None:
    case = cases.NormCase((3, 16, 5, 6), 4, torch.float32, x_layout)
    arguments = leaves(case.arguments(device))
    values = torch.randn(case.shape, generator=torch.Generator().manual_seed(2))
    grad = cases.LAYOUTS[layout](values).to(device)
    y = ops.group_norm_silu(**arguments)
    y.backward(grad)
    exact = leaves(exactly(arguments))
    MODULE.reference(**exact).backward(grad.cpu().double())
    assert cases.strides(arguments["x"].grad) == cases.strides(y)
    within(arguments["x"].grad, exact["x"].grad, torch.float32, BACKWARD[torch.float32])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group(device, cases, value, layout) -> None:
    case = cases.NormCase((2, 8, 4, 4), 4, torch.float32, layout)
    arguments = case.arguments(device)
    clean = ops.group_norm_silu(**arguments)
    arguments["x"][1, 2, 3, 1] = value
    y = ops.group_norm_silu(**arguments)
    hit = torch.zeros(2, 8, dtype=torch.bool, device=device)
    hit[1, 2:4] = True
    assert torch.equal(y[~hit], clean[~hit])
    assert y[hit].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_saturates(device, dtype) -> None:
    """Very negative arguments give zero, very positive ones themselves; never NaN."""
    bias = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30], device=device).to(dtype)
    x = torch.zeros(1, 7, 2, 2, dtype=dtype, device=device, requires_grad=True)
    y = ops.group_norm_silu(x, None, bias, 7)
    y.sum().backward()
    expected = torch.where(bias > 0, bias, torch.zeros_like(bias))
    assert torch.allclose(y[0, :, 0, 0], expected, rtol=1e-6, atol=1e-35)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_beyond_2_to_the_31(device, cases, layout) -> None:
    arguments = cases.NormCase((3, 8, 12, 8), 4, torch.float16, layout).arguments(device)
    x = arguments.pop("x")
    grad = torch.sin(torch.arange(x.numel(), device=device)).reshape(x.shape).to(x.dtype)
    results = []
    for given in (x, cases.far(x)):
        given.requires_grad_()
        y = ops.group_norm_silu(given, **arguments)
        y.backward(grad if given is x else cases.far(grad))
        results.append((y.detach(), given.grad))
    for near, distant in zip(*results, strict=True):
        assert torch.equal(near, distant)


def test_batch_does_not_matter(device, cases) -> None:
    for layout in ("contiguous", "channels_last"):
        case = cases.NormCase((5, 32, 9, 7), 8, torch.float32, layout, film=torch.float32)
        arguments = leaves(case.arguments(device))
        y = ops.group_norm_silu(**arguments)
        y.sum().backward()
        alone = {
            name: value[3:4].detach().requires_grad_() if name in ("x", "scale", "shift") else value
            for name, value in arguments.items()
        }
        one = ops.group_norm_silu(**alone)
        one.sum().backward()
        assert torch.equal(one, y[3:4])
        assert torch.equal(alone["x"].grad, arguments["x"].grad[3:4])


def test_same_bits_every_time_and_on_any_number_of_threads(place, device, cases) -> None:
    def run(case) -> list[Tensor]:
        arguments = leaves(case.arguments(device))
        y = ops.group_norm_silu(**arguments)
        y.backward(torch.sin(torch.arange(y.numel(), device=device)).view(y.shape).to(y.dtype))
        return [y.detach(), *(arguments[name].grad for name in TENSORS)]

    before = torch.get_num_threads()
    shape = (3, 64, 5, 31) if cases.INTERPRETED else (3, 64, 33, 31)
    for layout in ("contiguous", "channels_last"):
        case = cases.NormCase(shape, 8, torch.float32, layout, film=torch.float32)
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(case))
        torch.set_num_threads(before)
        for name, first, again, *others in zip(("y", *TENSORS), *results, strict=True):
            assert torch.equal(first, again), (layout, name)
            if place[0] != "reference":  # torch's own sums depend on the number of threads
                assert all(torch.equal(first, each) for each in others), (layout, name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(place, device, cases, layout) -> None:
    if place[0] in ("cuda", "triton"):
        return  # they compute in float32; test_backward holds their gradients against float64
    double = torch.float64
    case = cases.NormCase((2, 4, 2, 3), 2, double, layout, double, double)
    arguments = leaves(case.arguments(device))

    def call(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.group_norm_silu(x, weight, bias, 2, 1e-5, scale, shift, True)

    inputs = [arguments[name] for name in TENSORS]
    assert torch.autograd.gradcheck(call, inputs)
    if place[0] == "reference":
        assert torch.autograd.gradgradcheck(call, inputs)


def test_second_derivative_of_the_registered_op_is_refused() -> None:
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    y = torch.ops.palette.group_norm_silu(x, None, None, 2, 1e-5, None, None, True)[0]
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_statistics_of_the_registered_op(cases, within) -> None:
    for dtype, layout in [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")]:
        arguments = cases.NormCase((2, 8, 5, 3), 4, dtype, layout).arguments()
        _, mean, rstd = torch.ops.palette.group_norm_silu(**arguments)
        grouped = arguments["x"].double().reshape(2, 4, -1)
        assert mean.dtype == rstd.dtype == torch.float32
        within(mean, grouped.mean(-1), torch.float32, 8, "mean")
        wanted = (grouped.var(-1, correction=0) + 1e-5).rsqrt()
        within(rstd, wanted, torch.float32, 8, "rstd")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "transposed"])
def test_opcheck(cases, layout) -> None:
    film = torch.float32 if layout != "contiguous" else None
    case = cases.NormCase((2, 8, 3, 5), 4, torch.float32, layout, film=film)
    arguments = leaves(case.arguments())
    torch.library.opcheck(torch.ops.palette.group_norm_silu.default, tuple(arguments.values()))


def test_opcheck_backward(cases) -> None:
    for dtype, layout, affine in [
        (torch.float32, "channels_last", torch.float32),
        (torch.bfloat16, "contiguous", None),
    ]:
        case = cases.NormCase((2, 8, 3, 5), 4, dtype, layout, affine, affine)
        arguments = case.arguments()
        y, mean, rstd = torch.ops.palette.group_norm_silu(**arguments)
        inputs = (torch.ones_like(y), arguments["x"], mean, rstd, arguments["weight"],
                  arguments["bias"], 4, arguments["scale"], arguments["shift"], True)  # fmt: skip
        torch.library.opcheck(
            torch.ops.palette.group_norm_silu_backward.default,
            inputs,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_autocast_keeps_the_dtype(device) -> None:
    x = torch.randn(1, 8, 4, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.group_norm_silu(x, None, None, 4).dtype == torch.float32
        assert ops.group_norm_silu(x.bfloat16(), None, None, 4).dtype == torch.bfloat16


def test_function_transforms_of_the_reference() -> None:
    x = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    with ops.use("reference"):
        batched = torch.func.vmap(lambda one: ops.group_norm_silu(one, None, None, 2))(x)
        single = torch.stack([ops.group_norm_silu(one, None, None, 2) for one in x])
    assert torch.allclose(batched, single)


def test_forward_mode_derivative(device) -> None:
    x, tangent = torch.randn(2, 1, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.linspace(0.5, 1.5, 8, device=device)

    def call(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, weight, None, 4)

    slope = torch.func.jvp(call, (x,), (tangent,))[1]
    steps = [call(x + sign * 1e-3 * tangent) for sign in (1, -1)]
    assert torch.allclose(slope, (steps[0] - steps[1]) / 2e-3, atol=1e-3)
    assert slope.abs().max() > 0.1


WRONG = [
    ({"x": [1.0]}, TypeError, "x is list, wanted a tensor"),
    ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, TypeError, "x is int64, wanted float32 or"),
    ({"x": torch.zeros(8)}, ValueError, r"x has shape \[8\], wanted \[N, C, ...\]"),
    ({"groups": 3}, ValueError, "groups is 3, wanted a divisor of x's 8 channels"),
    ({"groups": 0}, ValueError, "groups is 0, wanted a divisor"),
    ({"eps": -1.0}, ValueError, "eps is -1.0, wanted a finite number >= 0"),
    (
        {
            "x": torch.zeros(2, 8, 4, 4).half(),
            "weight": torch.ones(8),
            "bias": torch.ones(8).half(),
        },
        TypeError,
        "bias, beside weight, is float16, wanted float32",
    ),
    ({"weight": torch.ones(4)}, ValueError, r"weight has shape \[4\], wanted \[8\]"),
    ({"bias": torch.ones(8, 1)}, ValueError, r"bias has shape \[8, 1\], wanted \[8\]"),
    ({"scale": torch.ones(2, 8, 1, 1)}, ValueError, r"scale has shape .*, wanted \[2, 8\]"),
    ({"shift": torch.ones(8)}, ValueError, r"shift has shape \[8\], wanted \[2, 8\]"),
    ({"weight": torch.ones(8).half()}, TypeError, "weight is float16, wanted float32"),
    ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta, wanted cpu"),
]


PLAIN = {"x": torch.zeros(2, 8, 4, 4), "weight": None, "bias": None, "groups": 4}


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[each[2] for each in WRONG])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_errors_name_the_argument(backend, change, error, message) -> None:
    with ops.use(backend), pytest.raises(error, match="group_norm_silu: " + message):
        ops.group_norm_silu(**{**PLAIN, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 4.0}, TypeError, "groups is 4.0, wanted an integer"),
        ({"groups": torch.tensor(4)}, TypeError, "groups is tensor.4., wanted an integer"),
        ({"eps": torch.tensor(0.1)}, TypeError, "eps is tensor.0.1000., wanted a number"),
        ({"eps": float("nan")}, ValueError, "eps is nan, wanted a finite number"),
        ({"silu": 1}, TypeError, "silu is 1, wanted True or False"),
        ({"weight": [1.0] * 8}, TypeError, "weight is list, wanted a tensor"),
        ({"x": torch.zeros(2, 8).to_sparse()}, TypeError, "x is a sparse_coo tensor"),
        ({"weight": torch.ones(8).to_sparse()}, TypeError, "weight is a sparse_coo tensor"),
        ({"scale": torch.ones(2, 8), "shift": torch.ones(2, 8).double()}, TypeError, "shift is"),
    ],
    ids=str,
)
def test_what_the_dispatcher_would_accept_or_say_otherwise(change, error, message) -> None:
    with pytest.raises(error, match="group_norm_silu: " + message):
        ops.group_norm_silu(**{**PLAIN, **change})


REFUSED = [each[0] for each in WRONG if not isinstance(each[0].get("x"), list)]


@pytest.mark.parametrize("change", [c for c in REFUSED if "meta" not in str(c)], ids=str)
def test_the_compiled_op_refuses_by_itself(compiled, cases, change) -> None:
    """Nothing is read beyond the end of a tensor, whoever calls it."""
    every = {"eps": 1e-5, "scale": None, "shift": None, "silu": True, **PLAIN, **change}
    every = cases.on(compiled, every)
    order = ("x", "weight", "bias", "groups", "eps", "scale", "shift", "silu")
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.palette.group_norm_silu(*(every[name] for name in order))


@pytest.mark.parametrize(
    "change",
    [
        {"grad": torch.zeros(2, 8, 1, 1)},
        {"grad": torch.zeros(2, 8, 4, 4).bfloat16()},
        {"mean": torch.zeros(1, 1)},
        {"rstd": torch.zeros(2)},
        {"groups": 0},
        {"weight": torch.ones(4)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_so_does_its_gradient(compiled, cases, change) -> None:
    x = torch.zeros(2, 8, 4, 4)
    statistics = {"mean": torch.zeros(2, 4), "rstd": torch.ones(2, 4)}
    parameters = {"weight": torch.ones(8), "bias": None, "groups": 4, "scale": None, "shift": None}
    every = {"grad": x, "x": x, **statistics, **parameters, "silu": True}
    torch.ops.palette.group_norm_silu_backward(*cases.on(compiled, every).values())
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.palette.group_norm_silu_backward(
            *cases.on(compiled, {**every, **change}).values()
        )


@pytest.mark.parametrize("level", [0.0, 3.0, 5.0, 254.0])
def test_statistics_of_bfloat16_near_and_far_from_zero(compiled, level) -> None:
    """To float32's precision: squares of numbers far from zero would leave too few digits."""
    g = torch.Generator().manual_seed(3)
    x = level + torch.rand(2, 64, 63, 65, generator=g).round()
    x = x.to(compiled, torch.bfloat16, memory_format=torch.channels_last)
    _, mean, rstd = torch.ops.palette.group_norm_silu(x, None, None, 32, 1e-5, None, None, True)
    groups = x.cpu().double().reshape(2, 32, -1)
    torch.testing.assert_close(mean.cpu().double(), groups.mean(2), rtol=1e-6, atol=1e-6)
    wanted = (groups.var(2, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.cpu().double(), wanted, rtol=1e-5, atol=0)
