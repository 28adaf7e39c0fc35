"""attention: every backend against float64, both head orders, gradients, layouts, errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from palette import ops
from palette.ops import _layout

MODULE = sys.modules["palette.ops.attention"]

# Allowed error in roundings to qkv's dtype: float32 sums over T and D, and in half formats torch's
# own kernel and ours for tensor cores round the weights before they multiply by v.
REFERENCE = {torch.float32: 32.0, torch.float64: 32.0, torch.bfloat16: 1.05, torch.float16: 1.05}
SDPA = {torch.float32: 32.0, torch.float64: 32.0, torch.bfloat16: 4.0, torch.float16: 4.0}
FACTORS = {"sdpa": SDPA, "triton": SDPA, "cuda": SDPA}
CASES = sys.modules["palette_op_cases"]
if CASES.EMULATED:
    FACTORS["cpp"] = FACTORS["cuda"]


def published_legacy(qkv: Tensor, heads: int) -> Tensor:
    """Attention as guided-diffusion states it for [N, (head, q|k|v, D), T], loop by loop."""
    n, width, t = qkv.shape
    d = width // (3 * heads)
    out = torch.empty(n, heads * d, t, dtype=qkv.dtype)
    for i in range(n):
        for head in range(heads):
            start = head * 3 * d
            q, k, v = (qkv[i, start + part * d : start + (part + 1) * d] for part in range(3))
            weights = torch.softmax((q * d**-0.25).T @ (k * d**-0.25), dim=-1)
            out[i, head * d : (head + 1) * d] = v @ weights.T
    return out


def test_reference_states_the_published_op(within) -> None:
    qkv = torch.randn(2, 3 * 12, 7, generator=torch.Generator().manual_seed(0)).double()
    legacy = MODULE.reference(qkv, 3, "legacy")
    within(legacy, published_legacy(qkv, 3), torch.float64, 32)
    # the other order is the same op on permuted channels
    permuted = qkv.reshape(2, 3, 3, 4, 7).transpose(1, 2).reshape(2, 36, 7)
    within(MODULE.reference(permuted, 3, "new"), legacy, torch.float64, 32)


def bound(place: tuple[str, str], case, grad: bool = False) -> float:
    factor = FACTORS.get(place[0], REFERENCE)[case.dtype]
    # Rounding a logit of size L moves its weight by L units; the gradient multiplies by it again.
    return factor * max(1.0, case.logits**2) * (2 if grad else 1)


def test_forward(attention_case, place, device, cases, within) -> None:
    arguments = attention_case.arguments(device)
    qkv, before = arguments["qkv"], arguments["qkv"].clone()
    out = ops.attention(**arguments)
    exact = MODULE.reference(qkv.cpu().double(), attention_case.heads, attention_case.order)
    assert out.dtype == qkv.dtype
    assert cases.strides(out) == cases.strides(_layout.empty_like(qkv, qkv.shape[1] // 3))
    within(out, exact, out.dtype, bound(place, attention_case))
    assert torch.equal(qkv, before)


def test_backward(attention_case, place, device, within) -> None:
    arguments = attention_case.arguments(device)
    heads, order = attention_case.heads, attention_case.order
    qkv = arguments["qkv"].requires_grad_()
    out = ops.attention(**arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad.to(device))
    exact = qkv.detach().cpu().double().requires_grad_()
    MODULE.reference(exact, heads, order).backward(grad.double())
    within(qkv.grad, exact.grad, qkv.dtype, bound(place, attention_case, grad=True))


def test_scores_far_below_zero(device, within) -> None:
    """exp(-log-sum-exp) overflows: no key that is not there may take part."""
    qkv = torch.randn(1, 96, 5, generator=torch.Generator().manual_seed(0))
    qkv[:, :32], qkv[:, 32:64] = 30 + qkv[:, :32], -30 + 0.01 * qkv[:, 32:64]
    exact, given = qkv.double().requires_grad_(), qkv.to(device).requires_grad_()
    out, wanted = ops.attention(given, 1, "new"), MODULE.reference(exact, 1, "new")
    out.sum().backward()
    wanted.sum().backward()
    # a score of 5000 is rounded by 2^-12: that is the error of its weight
    assert torch.allclose(out.cpu().double(), wanted, rtol=0, atol=4e-3)
    assert torch.allclose(given.grad.cpu().double(), exact.grad, rtol=0, atol=0.3)


def test_registered_op(attention_case, within) -> None:
    """The op in the dispatcher: result, log-sum-exp and the backward formula."""
    arguments = attention_case.arguments()
    heads, order = attention_case.heads, attention_case.order
    qkv = arguments["qkv"].requires_grad_()
    out, lse = torch.ops.palette.attention(**arguments)
    exact = qkv.detach().double().requires_grad_()
    wanted = MODULE.reference(exact, heads, order)
    place = ("reference", "cpu")
    within(out, wanted, out.dtype, bound(place, attention_case))
    q, k, _ = MODULE._unpack(exact.detach(), heads, order)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    within(lse, torch.logsumexp(scores, -1), lse.dtype, 32, "lse")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad)
    wanted.backward(grad.double())
    # The formula starts from the rounded result: in half formats that costs some roundings more.
    factor = 2 * bound(place, attention_case, grad=True)
    within(qkv.grad, exact.grad, qkv.dtype, factor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "wide_rows"])
def test_gradient_in_any_layout(device, cases, within, layout) -> None:
    qkv = cases.AttentionCase((2, 48, 3, 5), 2, layout="channels_last").arguments(device)["qkv"]
    grad = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(2))
    grad = cases.LAYOUTS[layout](grad).to(device)
    ops.attention(qkv.requires_grad_(), 2, "legacy").backward(grad)
    exact = qkv.detach().cpu().double().requires_grad_()
    MODULE.reference(exact, 2, "legacy").backward(grad.cpu().double())
    within(qkv.grad, exact.grad, torch.float32, 64)


class OnGPU(Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "wide_rows"])
@pytest.mark.parametrize("shape", [(2, 48, 3, 5), (2, 48, 17)], ids=str)
def test_what_torchs_kernels_for_gpus_get(monkeypatch, cases, shape, layout) -> None:
    """They want neighbours in the last dimension, and else torch falls back to plain products."""
    attend, seen = MODULE.F.scaled_dot_product_attention, []

    def noted(*parts: Tensor) -> Tensor:
        seen.extend(parts)
        return attend(*parts)

    monkeypatch.setattr(MODULE.F, "scaled_dot_product_attention", noted)
    qkv = cases.LAYOUTS[layout](torch.randn(shape))
    out = MODULE.sdpa(qkv.as_subclass(OnGPU), 2, "legacy")
    assert [each.stride(-1) for each in seen] == [1, 1, 1]
    assert cases.strides(out) == cases.strides(_layout.empty_like(qkv, shape[1] // 3))
    assert torch.allclose(out, MODULE.reference(qkv, 2, "legacy"), atol=1e-6)


@pytest.mark.parametrize(("part", "rows"), [(0, 1), (1, 15), (2, 15)], ids=["q", "k", "v"])
def test_not_a_number_stays_in_its_head(device, cases, part, rows) -> None:
    """In a query it spoils that query's result, in a key or value the head's."""
    qkv = cases.AttentionCase((2, 48, 3, 5), 2, "new").arguments(device)["qkv"]
    clean = ops.attention(qkv, 2, "new")
    qkv[1, 16 * part + 8 + 3, 1, 2] = float("nan")  # head 1
    out = ops.attention(qkv, 2, "new")
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, :8], clean[1, :8])
    assert out[1, 8:].isnan().any(0).sum() == rows


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_beyond_2_to_the_31(device, cases, layout) -> None:
    case = cases.AttentionCase((3, 96, 4, 5), 2, dtype=torch.float16, layout=layout)
    qkv = case.arguments(device)["qkv"]
    grad = torch.sin(torch.arange(qkv.numel() // 3, device=device)).reshape(3, 32, 4, 5).half()
    results = []
    for given in (qkv, cases.far(qkv)):
        given.requires_grad_()
        out = ops.attention(given, 2, "new")
        out.backward(grad if given is qkv else cases.far(grad))
        results.append((out.detach(), given.grad))
    for near, distant in zip(*results, strict=True):
        assert torch.equal(near, distant)


def test_a_sample_is_the_same_alone(place, device, cases) -> None:
    if place[0] in ("reference", "sdpa"):
        return  # torch's products depend on the shape of the batch
    for layout in ("contiguous", "channels_last"):
        case = cases.AttentionCase((3, 96, cases.MANY), 2, layout=layout)
        qkv = case.arguments(device)["qkv"].requires_grad_()
        alone = qkv[1:2].detach().requires_grad_()
        whole = ops.attention(qkv, 2, "legacy")
        part = ops.attention(alone, 2, "legacy")
        assert torch.equal(part[0], whole[1])
        whole.backward(torch.sin(torch.arange(whole.numel(), device=device)).view(whole.shape))
        grad = torch.sin(torch.arange(whole.numel(), device=device)).view(whole.shape)[1:2]
        part.backward(grad)
        assert torch.equal(alone.grad[0], qkv.grad[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_same_bits_every_time_and_on_any_number_of_threads(place, device, cases, dtype) -> None:
    layout = "contiguous" if dtype == torch.float32 else "channels_last"

    def run() -> list[Tensor]:
        case = cases.AttentionCase((2, 192, cases.MANY), 2, dtype=dtype, layout=layout)
        qkv = case.arguments(device)["qkv"].requires_grad_()
        out = ops.attention(qkv, 2, "legacy")
        if place == ("sdpa", "cuda"):
            return [out.detach()]  # torch's gradient adds in the order in which blocks end
        out.backward(torch.sin(torch.arange(out.numel(), device=device)).to(dtype).view(out.shape))
        return [out.detach(), qkv.grad]

    before, results = torch.get_num_threads(), []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run())
    torch.set_num_threads(before)
    for first, again, *others in zip(*results, strict=True):
        assert torch.equal(first, again)
        if place[0] not in ("reference", "sdpa"):  # torch's sums depend on the number of threads
            assert all(torch.equal(first, each) for each in others)


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(cases, layout, order) -> None:
    qkv = torch.randn(1, 12, 2, 2, dtype=torch.float64)
    qkv = cases.LAYOUTS[layout](qkv).requires_grad_()
    with ops.use("reference"):
        assert torch.autograd.gradcheck(lambda each: ops.attention(each, 2, order), qkv)
        assert torch.autograd.gradgradcheck(lambda each: ops.attention(each, 2, order), qkv)
    op = torch.ops.palette.attention
    assert torch.autograd.gradcheck(lambda each: op(each, 2, order)[0], qkv)


def test_second_derivative_of_the_registered_op_is_refused() -> None:
    qkv = torch.randn(1, 12, 5, requires_grad=True)
    out = torch.ops.palette.attention(qkv, 2, "new")[0]
    (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice", "transposed"])
def test_opcheck(cases, layout) -> None:
    case = cases.AttentionCase((2, 24, 3, 4), 2, "legacy", layout=layout)
    qkv = case.arguments()["qkv"].requires_grad_()
    torch.library.opcheck(torch.ops.palette.attention.default, (qkv, 2, "legacy"))


def test_opcheck_backward(cases) -> None:
    for order, layout in [("legacy", "channels_last"), ("new", "contiguous")]:
        case = cases.AttentionCase((2, 24, 3, 4), 2, order, torch.bfloat16, layout)
        qkv = case.arguments()["qkv"]
        out, lse = torch.ops.palette.attention(qkv, 2, order)
        torch.library.opcheck(
            torch.ops.palette.attention_backward.default,
            (torch.ones_like(out), qkv, out, lse, 2, order),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_autocast_keeps_the_dtype(device, within) -> None:
    qkv = torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ops.attention(qkv, 2, "legacy")
    assert out.dtype == torch.float32
    within(out, MODULE.reference(qkv.cpu().double(), 2, "legacy"), torch.float32, 32)


def test_function_transforms_of_the_reference() -> None:
    qkv = torch.randn(3, 1, 12, 5, dtype=torch.float64)
    with ops.use("reference"):
        batched = torch.func.vmap(lambda one: ops.attention(one, 2, "new"))(qkv)
        single = torch.stack([ops.attention(one, 2, "new") for one in qkv])
    assert torch.allclose(batched, single)


WRONG = [
    ({"qkv": None}, TypeError, "qkv is NoneType, wanted a tensor"),
    ({"qkv": torch.zeros(1, 12, 4, dtype=torch.int32)}, TypeError, "qkv is int32, wanted float32"),
    ({"qkv": torch.zeros(12, 4)}, ValueError, r"qkv has shape \[12, 4\], wanted \[N, 3C, H, W\]"),
    ({"heads": 3}, ValueError, r"qkv has shape \[1, 12, 4\], wanted a multiple of 3 \* heads = 9"),
    ({"heads": 0}, ValueError, "wanted a multiple of 3"),
    ({"order": "old"}, ValueError, "order is 'old', wanted 'legacy' or 'new'"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[each[2] for each in WRONG])
def test_errors_name_the_argument(change, error, message) -> None:
    arguments = {"qkv": torch.zeros(1, 12, 4), "heads": 2, "order": "new", **change}
    with pytest.raises(error, match="attention: .*" + message):
        ops.attention(**arguments)


@pytest.mark.parametrize(
    "change", [{"heads": 0}, {"heads": -1}, {"heads": 5}, {"qkv": torch.zeros(2, 24)}], ids=str
)
def test_the_compiled_op_refuses_by_itself(compiled, change) -> None:
    """Nothing is read beyond the end of a tensor, whoever calls it."""
    every = {"qkv": torch.zeros(1, 24, 4, 4), "heads": 2, **change}
    with pytest.raises(RuntimeError, match="heads that do not fit"):
        torch.ops.palette.attention(every["qkv"].to(compiled), every["heads"], "legacy")


def test_it_refuses_an_order_that_there_is_not(compiled) -> None:
    with pytest.raises(RuntimeError, match="order is 'old', wanted 'legacy' or 'new'"):
        torch.ops.palette.attention(torch.zeros(1, 24, 4, 4, device=compiled), 2, "old")


@pytest.mark.parametrize(
    "change",
    [
        {"grad": torch.zeros(1, 8, 2, 4)},
        {"grad": torch.zeros(1, 8, 4, 4).double()},
        {"out": torch.zeros(1, 4, 4, 4)},
        {"out": torch.zeros(1, 8, 4, 4).bfloat16()},
        {"lse": torch.zeros(1, 1, 16)},
        {"lse": torch.zeros(1, 2, 16).double()},
        {"heads": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_so_does_its_gradient(compiled, cases, change) -> None:
    qkv = torch.zeros(1, 24, 4, 4, device=compiled)
    out, lse = torch.ops.palette.attention(qkv, 2, "legacy")
    every = {"grad": out, "qkv": qkv, "out": out, "lse": lse, "heads": 2}
    every |= cases.on(compiled, change)
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.palette.attention_backward(*every.values(), "legacy")
