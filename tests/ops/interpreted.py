"""What the tests of every backend leave open about the Triton kernels, in Triton's interpreter.

Run by test_triton.py in a process of its own: TRITON_INTERPRET=1 must be set before the import.
"""

from __future__ import annotations

import importlib
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from palette import ops
from palette.ops import philox

norm = importlib.import_module("palette.kernels.group_norm_silu")
norm_backward = importlib.import_module("palette.kernels.group_norm_silu_backward")
shared = importlib.import_module("palette.kernels._group_norm")
noise = importlib.import_module("palette.kernels.noise")
reference = sys.modules["palette.ops.group_norm_silu"].reference

# Random123's known answers: counter, key, words.
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def words_kernel(given, out, uniforms):
    i = tl.arange(0, 8)
    one = tl.load(given + i * 0).to(tl.uint32)
    c1 = tl.load(given + i * 0 + 1).to(tl.uint32)
    c2 = tl.load(given + i * 0 + 2).to(tl.uint32)
    c3 = tl.load(given + i * 0 + 3).to(tl.uint32)
    k0 = tl.load(given + i * 0 + 4).to(tl.uint32)
    k1 = tl.load(given + i * 0 + 5).to(tl.uint32)
    w0, w1, w2, w3 = noise.philox(one, c1, c2, c3, k0, k1)
    tl.store(out + i * 4, w0.to(tl.int64))
    tl.store(out + i * 4 + 1, w1.to(tl.int64))
    tl.store(out + i * 4 + 2, w2.to(tl.int64))
    tl.store(out + i * 4 + 3, w3.to(tl.int64))
    tl.store(uniforms + i, noise.uniform(w1))


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_words_equal_the_known_answers(counter, key, wanted) -> None:
    out, uniforms = torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8)
    words_kernel[(1,)](torch.tensor([*counter, *key]), out, uniforms)
    assert (out == torch.tensor(wanted)).all()
    assert torch.equal(uniforms, philox.to_uniform(out[:, 1]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 7])
def test_slabs_of_several_tiles(monkeypatch, cases, within, layout, programs) -> None:
    """At real sizes a slab is several tiles; at test sizes only with fewer programs wanted."""
    monkeypatch.setattr(shared, "PROGRAMS", programs)
    case = cases.NormCase((1, 80, 41, 37), 16, torch.float32, layout, film=torch.float32)
    plan = shared.plan_of(80, 41 * 37, layout == "channels_last")
    assert plan.tiles > 1
    assert programs == 1 or plan.slabs > 1
    given = case.arguments()
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    for each in (given, wide):
        for name in ("x", "weight", "bias", "scale", "shift"):
            each[name] = each[name].detach().requires_grad_()
    with ops.use("triton"):
        y = ops.group_norm_silu(**given)
    exact = reference(**wide)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
    y.backward(grad)
    exact.backward(grad.double())
    within(y, exact, torch.float32, 8)
    for name in ("x", "weight", "bias", "scale", "shift"):
        within(given[name].grad, wide[name].grad, torch.float32, 16, name)


FAR = 2**30 + 2**20  # elements from one sample to the next: a stride that fits into 32 bits


class Sparse:
    """float16 [3, C, S] whose last sample lies further away than 32-bit offsets reach, in memory
    that takes space only where it is touched."""

    def __init__(self, channels: int, spatial: int) -> None:
        self.memory = mmap.mmap(-1, 2 * (2 * FAR + channels * spatial))
        flat = torch.frombuffer(self.memory, dtype=torch.float16)
        self.tensor = flat.as_strided((3, channels, spatial), (FAR, spatial, 1))


def test_addresses_beyond_2_to_the_31(within) -> None:
    c, spatial, groups = 8, 96, 4
    x, y, grad, grad_x = (Sparse(c, spatial).tensor for _ in range(4))
    g = torch.Generator().manual_seed(0)
    for each in (x, grad):
        each.copy_(torch.randn(each.shape, generator=g))
    plan = shared.plan_of(c, spatial, False)
    cut = (plan.tiles, plan.slabs, plan.columns)
    grid = (3 * plan.slabs * plan.columns,)
    shape = {"POSITIONS": plan.positions, "CHANNELS": plan.channels}
    partials = torch.empty(3, plan.slabs, 2, c)
    mean, rstd = torch.empty(3, groups), torch.empty(3, groups)
    corrections, totals = torch.empty(3, groups, 2), torch.empty(3, 2, c)
    none = shared.parameters(None, None, None, None)

    norm.moments_kernel[grid](x, partials, c, spatial, *x.stride(), *cut, **shape)
    norm.fold_moments_kernel[(3 * groups,)](
        partials, mean, rstd, c, spatial, groups, 1e-5, plan.slabs, plan.tiles * plan.positions,
        BLOCK=64,
    )  # fmt: skip
    norm.apply_kernel[grid](
        x, y, mean, rstd, *none, c, spatial, groups, *x.stride(), *y.stride(), *cut, SILU=True,
        **shape,
    )  # fmt: skip
    norm_backward.sums_kernel[grid](
        grad, x, mean, rstd, *none, partials, c, spatial, groups, *grad.stride(), *x.stride(),
        *cut, SILU=True, **shape,
    )  # fmt: skip
    norm_backward.fold_sums_kernel[(3 * groups,)](
        partials, rstd, *none, totals, corrections, None, None, c, spatial, groups, plan.slabs,
        ROWS=4, MEMBERS=2,
    )  # fmt: skip
    norm_backward.gradient_kernel[grid](
        grad, x, grad_x, mean, rstd, corrections, *none, c, spatial, groups, *grad.stride(),
        *x.stride(), *grad_x.stride(), *cut, SILU=True, **shape,
    )  # fmt: skip

    wide = x.double().requires_grad_()
    exact = reference(wide, None, None, groups)
    exact.backward(grad.double())
    within(y, exact, torch.float16, 1.05)
    within(grad_x, wide.grad, torch.float16, 1.05)


def test_opcheck_as_far_as_the_interpreter_goes(cases) -> None:
    """Schemas tell what is changed, gradients are registered; the rest is in test_composability.py,
    on a GPU."""
    importlib.import_module("palette.kernels.attention")
    importlib.import_module("palette.kernels.reverse_step")
    utilities = ("test_schema", "test_autograd_registration")
    norm_case = cases.NormCase((2, 8, 3, 5), 4, torch.float32, "channels_last", film=torch.float32)
    given = norm_case.arguments()
    x = given["x"].requires_grad_()
    torch.library.opcheck(
        torch.ops.palette.group_norm_silu_triton.default,
        (x, *list(given.values())[1:]),
        test_utils=utilities,
    )
    qkv = cases.AttentionCase((2, 24, 3, 4), 2).arguments()["qkv"].requires_grad_()
    torch.library.opcheck(
        torch.ops.palette.attention_triton.default, (qkv, 2, "new"), test_utils=utilities
    )
    out, lse = torch.ops.palette.attention_triton(qkv.detach(), 2, "new")
    y, mean, rstd = torch.ops.palette.group_norm_silu_triton(x.detach(), *list(given.values())[1:])
    norm_arguments = (torch.ones_like(y), x.detach(), mean, rstd, given["weight"], given["bias"], 4,
                      given["scale"], given["shift"], True)  # fmt: skip
    for name, arguments in (
        ("noise_triton", (torch.tensor([1, -2]), torch.tensor(3), [3, 5], 0, 0)),
        ("attention_backward_triton", (torch.ones_like(out), qkv.detach(), out, lse, 2, "new")),
        ("group_norm_silu_backward_triton", norm_arguments),
    ):
        op = getattr(torch.ops.palette, name).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema",))
    step = cases.StepCase(draw="seeds", history=True, mask="fraction", slot="channels_last")
    torch.library.opcheck(
        torch.ops.palette.reverse_step_triton.default,
        tuple(step.arguments().values()),
        test_utils=("test_schema",),
    )


def test_launched_where_the_tensors_are(monkeypatch, cases) -> None:
    """Triton launches on the current GPU, whichever the tensors are on."""
    entered = []

    @contextmanager
    def noted(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", noted)
    seeds = torch.arange(2)
    made = (cases.NormCase((2, 8, 3, 5), 4), cases.AttentionCase((2, 24, 5), 2), cases.StepCase())
    norm, attention, step = (each.arguments() for each in made)
    with ops.use("triton"):
        ops.group_norm_silu(**norm)
        ops.attention(**attention)
        ops.reverse_step(**step)
        ops.dropout(norm["x"], seeds, 0.3, 1)
        ops.noise(seeds, 1, (4,))
    wanted = (norm["x"], attention["qkv"], step["state"], norm["x"], seeds)
    assert len(entered) == len(wanted)
    assert all(a is b for a, b in zip(entered, wanted, strict=True))


def test_second_derivative_is_refused_in_one_line(cases) -> None:
    x = cases.NormCase((2, 8, 3, 5), 4).arguments()["x"]
    qkv = cases.AttentionCase((1, 24, 5), 2).arguments()["qkv"]
    for op, call, leaf in (
        ("group_norm_silu", lambda: ops.group_norm_silu(x, None, None, 4), x),
        ("attention", lambda: ops.attention(qkv, 2, "new"), qkv),
    ):
        leaf.requires_grad_()
        with ops.use("triton"):
            (grad,) = torch.autograd.grad(call().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{op}: the compiled op has no second derivative"):
            grad.square().sum().backward()
