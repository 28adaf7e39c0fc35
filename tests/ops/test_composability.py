"""What torch does around an op: compile, export, autocast, transform, differentiate twice, capture.

Every backend of this machine on each of its devices. opcheck is in test_<op>.py for the CPU and
here for a GPU, where ``make gpu`` runs this file.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from palette import ops

CASES = sys.modules["palette_op_cases"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")


def norm(x: Tensor, weight: Tensor, film: Tensor) -> Tensor:
    c = x.shape[1]
    return ops.group_norm_silu(x, weight, None, 4, 1e-5, film[:, :c], film[:, c:])


def attend(qkv: Tensor) -> Tensor:
    return ops.attention(qkv, 2, "legacy")


def drop(x: Tensor) -> Tensor:
    return ops.dropout(x, torch.arange(x.shape[0], device=x.device), 0.3, 2)


def step(state: Tensor, output: Tensor, table: Tensor, now: Tensor, seeds: Tensor) -> Tensor:
    """A step of a sampler: what it changes, and fresh noise."""
    ops.reverse_step(state, output, table, now, seeds=seeds)
    return state + ops.noise(seeds, now, state.shape[1:])


def norm_inputs(batch: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 12, 5, 7, generator=g).contiguous(memory_format=torch.channels_last)
    return [x, 1 + 0.1 * torch.randn(12, generator=g), torch.randn(batch, 24, generator=g)]


def attention_inputs(batch: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    qkv = torch.randn(batch, 48, 5, 6, generator=g)
    return [qkv.contiguous(memory_format=torch.channels_last)]


def drop_inputs(batch: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, 12, 6, 6, generator=g).contiguous(memory_format=torch.channels_last)]


def step_inputs(batch: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    state, output = torch.randn(2, batch, 3, 11, 13, generator=g)
    table = torch.tensor([[1.1, -0.4, 0.3, 0.7, 0.0, 0.2], [1.0, -0.1, 0.9, 0.1, 0.0, 0.1]] * 5)
    return [state, output, table, torch.tensor(0), torch.arange(batch)]


CALLS = {
    "group_norm_silu": (norm, norm_inputs),
    "attention": (attend, attention_inputs),
    "dropout": (drop, drop_inputs),
    "reverse_step": (step, step_inputs),
}
PLACES = [(op, *place) for op in CALLS for place in CASES.places(op)]
# The reference is plain PyTorch, and test_backends.py compiles it once.
REGISTERED = [each for each in PLACES if each[1] != "reference"]
DIFFERENTIABLE = [each for each in PLACES if each[0] != "reverse_step"]
# Those of dropout, which is linear, are in test_dropout.py.
CURVED = [each for each in DIFFERENTIABLE if each[0] != "dropout"]
ON_GPU = [each for each in REGISTERED if each[2] == "cuda" and each[1] != "sdpa"]

where_registered = pytest.mark.parametrize(("op", "backend", "device"), REGISTERED)
where_differentiable = pytest.mark.parametrize(("op", "backend", "device"), DIFFERENTIABLE)
# One place that is skipped where there is none, rather than nothing to be seen.
on_gpu = pytest.mark.parametrize(
    ("op", "backend", "device"), ON_GPU or [("every op", "cuda", "cuda")]
)


def run(call: Callable[..., Tensor], inputs: list[Tensor], gradients: bool) -> list[Tensor]:
    """The result, then the gradients of all inputs, or the inputs as they were left."""
    given = [each.clone() for each in inputs]
    for each in given:
        each.requires_grad_(gradients and each.is_floating_point())
    out = call(*given)
    return backward(out, given) if gradients else [out, *given]


def backward(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    grad = torch.sin(torch.arange(out.numel(), device=out.device)).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@where_registered
def test_compiled_once_for_every_batch(op, backend, device) -> None:
    """fullgraph=True allows no graph break; a batch of another size compiles nothing again."""
    torch._dynamo.reset()
    call, make = CALLS[op]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    with ops.use(backend):
        for batch in (2, 4, 8):  # no other dimension is as long
            inputs = [each.to(device) for each in make(batch)]
            ours = run(compiled, inputs, op != "reverse_step")
            wanted = run(call, inputs, op != "reverse_step")
            for value, other in zip(ours, wanted, strict=True):
                assert value.stride() == other.stride()
                assert torch.allclose(value, other, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Network(nn.Module):
    """Every op, as an exported network would hold them."""

    def forward(self, x: Tensor, weight: Tensor, qkv: Tensor, seeds: Tensor) -> Tensor:
        h = ops.dropout(ops.group_norm_silu(x, weight, None, 4), seeds, 0.3, 2)
        state = h.contiguous() + ops.noise(seeds, 1, h.shape[1:])
        table = torch.tensor([[1.1, -0.4, 0.3, 0.7, 0.0, 0.2]])
        out = ops.attention(qkv, 2, "new")
        ops.reverse_step(state, out, table, torch.tensor(0), seeds=seeds)
        return state


def test_exported_saved_and_run_elsewhere(tmp_path: Path) -> None:
    """With any batch, in a process that has imported palette.ops and nothing of this file."""

    def inputs(batch: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(batch)
        x, qkv = torch.randn(batch, 8, 4, 6, generator=g), torch.randn(batch, 24, 4, 6, generator=g)
        return x, torch.ones(8), qkv, torch.arange(batch)

    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, None, {0: batch}, {0: batch})
    program = torch.export.export(Network(), inputs(2), dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes}
    for op in set(ops.names()) - {"adamw"}:  # whose place is after a network
        if ops.default(op, "cpu") == "cpp":
            assert f"palette.{op}.default" in called
    torch.export.save(program, tmp_path / "network.pt2")
    given = inputs(5)
    with torch.no_grad():
        torch.save((given, Network()(*given)), tmp_path / "expected.pt")
    code = (
        "import torch, palette.ops\n"
        "network = torch.export.load('network.pt2').module()\n"
        "given, wanted = torch.load('expected.pt')\n"
        "assert torch.equal(network(*given), wanted)\n"
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


@where_differentiable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(op, backend, device, dtype) -> None:
    """What goes in decides the dtype, forward and backward: autocast does not."""
    call, make = CALLS[op]
    inputs = [each.to(device, dtype).requires_grad_() for each in make(2)]
    with ops.use(backend):
        plain = call(*inputs)
        with torch.autocast(device, dtype=torch.bfloat16):
            cast = call(*inputs)
        pairs = zip(backward(cast, inputs), backward(plain, inputs), strict=True)
    for value, other in pairs:
        assert value.dtype == dtype
        assert torch.equal(value, other)


@pytest.mark.parametrize(("op", "backend", "device"), CURVED)
def test_second_derivative_is_right_or_refused_in_one_line(op, backend, device) -> None:
    call, make = CALLS[op]
    first, *rest = (each.to(device) for each in make(1))
    first.requires_grad_()
    with ops.use(backend):
        (grad,) = torch.autograd.grad(call(first, *rest).sum(), first, create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(grad.square().sum(), first)[0].isfinite().all()
            return
        with pytest.raises(RuntimeError) as caught:
            grad.square().sum().backward()
    message = str(caught.value)
    assert "\n" not in message
    if backend == "sdpa":  # torch's own words
        assert "is not implemented" in message
    else:
        assert message.startswith(f"{op}: the compiled op has no second derivative")
        assert 'palette.ops.use("reference") has one' in message


@where_differentiable
def test_function_transforms(op, backend, device) -> None:
    """torch.func's gradient and vmap are right, or refused: never wrong."""
    call, make = CALLS[op]
    inputs = [each.to(device) for each in make(3)]
    stacked = [torch.stack((each, each.flip(0))) for each in inputs]
    leaf = inputs[0].clone().requires_grad_()
    with ops.use(backend):
        call(leaf, *inputs[1:]).square().sum().backward()
        one_by_one = torch.stack([call(*(each[i] for each in stacked)) for i in range(2)])
        for transformed, wanted in (
            (lambda: torch.func.vmap(call)(*stacked), one_by_one),
            (
                lambda: torch.func.grad(lambda x: call(x, *inputs[1:]).square().sum())(inputs[0]),
                leaf.grad,
            ),
        ):
            try:
                found = transformed()
            except RuntimeError as refused:
                found, reason = None, str(refused)
            if found is None:
                assert backend != "reference"
                assert "vmap" in reason
            else:
                assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@needs_gpu
@on_gpu
def test_captured_in_a_graph(op, backend, device) -> None:
    """Replayed on other numbers it gives the bits that the calls give, gradients too."""
    call, make = CALLS[op]
    gradients = op != "reverse_step"
    inputs = [each.to(device) for each in make(2)]
    with ops.use(backend):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run(call, inputs, gradients)  # what is compiled or chosen at the first call
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(call, inputs, gradients)
        for seed in (1, 2):
            torch.manual_seed(seed)
            for each in inputs:
                if each.is_floating_point():
                    each.copy_(torch.randn_like(each))
            graph.replay()
            wanted = run(call, inputs, gradients)
            for value, other in zip(captured, wanted, strict=True):
                assert torch.equal(value, other)


@needs_gpu
def test_a_captured_step_follows_the_counter() -> None:
    """One graph, replayed: the step on the device picks the row and the noise of each replay."""
    for backend in ("cuda", "triton"):
        if backend not in ops.backends("reverse_step"):
            continue
        inputs = [each.cuda() for each in step_inputs(2)]
        state, output, table, now, seeds = inputs
        start = state.clone()
        with ops.use(backend):
            ops.reverse_step(state.clone(), output, table, now, seeds=seeds)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                ops.reverse_step(state, output, table, now, seeds=seeds)
                now.add_(1)
            state.copy_(start)
            now.zero_()
            graph.replay()
            graph.replay()
            wanted = start.clone()
            for i in range(2):
                at = torch.tensor(i, device="cuda")
                ops.reverse_step(wanted, output, table, at, seeds=seeds)
        assert torch.equal(state, wanted)


@needs_gpu
@on_gpu
def test_opcheck(op, backend, device) -> None:
    """All four utilities on the registered op."""
    suffix = {"cuda": "", "triton": "_triton"}.get(backend)
    if suffix is None:
        return  # plain PyTorch registers nothing
    if suffix:
        importlib.import_module(f"palette.kernels.{op}")
    case = {
        "group_norm_silu": CASES.NormCase((2, 8, 3, 5), 4, layout="channels_last", film=CASES.f32),
        "attention": CASES.AttentionCase((2, 96, 3, 4), 2, layout="channels_last"),
        "dropout": CASES.DropCase((2, 8, 4, 6), layout="channels_last"),
        "reverse_step": CASES.StepCase(
            draw="seeds", history=True, mask="binary", slot="contiguous"
        ),
    }[op]
    arguments = list(case.arguments(device).values())
    if op != "reverse_step":
        arguments[0].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.palette, op + suffix).default, tuple(arguments))
