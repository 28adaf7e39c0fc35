"""A step as work that can be captured once and replayed.

Without a GPU a tape stands in for the CUDA graph: like one it knows nothing but the operations of
one step and the addresses of their tensors, so what a step takes from anywhere else shows. On a GPU
(``make gpu``) the same is asked of real graphs.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from palette import ops
from palette.diffusion import sampler as sampler_module
from palette.diffusion.buffers import Arguments
from palette.diffusion.graph import Repeated
from palette.diffusion.sampler import Sampler
from palette.diffusion.schedule import Schedule, spaced
from palette.diffusion.solvers import SOLVERS
from palette.models import layers, sr3
from palette.models.tiled import Tiled
from palette.models.unet import UNet

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")
LEVELS = spaced(Schedule.from_name("linear", 100, 1e-4, 0.05), 5)


class Tape(TorchDispatchMode):
    """The operations of some work, with the very tensors that they were called on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    @classmethod
    def of(cls, work: Callable[[], None]) -> Tape:
        """Record the work, then put every tensor back as it was."""
        tape = cls()
        with tape:
            work()
        for whole, kept in tape.before.values():
            whole.copy_(kept)
        return tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        for each in given:
            if address(each) not in self.made:
                storage = torch.empty(0, dtype=torch.uint8).set_(each.untyped_storage())
                self.before.setdefault(address(each), (storage, storage.clone()))
        result = func(*args, **kwargs)
        fresh = [e for e in tensors(result) if address(e) not in {*map(address, given)}]
        self.made.update(map(address, fresh))
        self.calls.append((func, args, kwargs, fresh))
        return result

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.calls:
            again = {id(each) for each in fresh}
            results = tensors(func(*args, **kwargs))
            for old, new in zip(fresh, results[len(results) - len(again) :], strict=True):
                old.copy_(new)


def tensors(tree: object) -> list[Tensor]:
    return [each for each in tree_iter(tree) if isinstance(each, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TapedGraphs:
    """In place of ``Graphs``; a graph is counted and replayed by the CPU."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        tape = Tape.of(work)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> TapedGraphs:
    """Every sampler with ``graph`` replays its steps on the CPU."""
    graphs = TapedGraphs()
    monkeypatch.setattr(sampler_module, "Graphs", lambda device: graphs)
    monkeypatch.setattr(Sampler, "_captures", lambda self, device: self.graph)
    return graphs


def pointwise(x: Tensor, gamma: Tensor) -> Tensor:
    condition, noisy = x.float().split([x.shape[1] - 3, 3], dim=1)
    hint = torch.sin(3 * condition.sum(1, keepdim=True))
    return noisy * (1 - gamma)[:, None, None, None].sqrt() + 0.1 * hint


def make_network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 8, "in_channels": 6, "channel_mults": (1, 2)}
    if kind == "sr3":
        return sr3.SR3UNet(**options, out_channels=3, channels=32, res_blocks=1).eval()
    options |= {"out_channels": 3, "channels": 32, "res_blocks": 1, "attention_resolutions": ()}
    if kind == "told":
        options |= {"num_classes": 4, "condition_level": True}
    network = UNet(**options, zero_init=False).eval()
    if kind == "told":
        nn.init.normal_(network.condition_embed[-1].weight)
    return Tiled(network, (8, 8)) if kind == "tiled" else network


def make_call(
    seed: int, count: int = 2, size: tuple[int, int] = (8, 8), device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of a call, all of them another with another ``seed``."""
    g = torch.Generator().manual_seed(seed)
    known = torch.rand(count, 3, *size, generator=g) * 2 - 1
    mask = (torch.rand(count, 1, *size, generator=g) < 0.5).float()
    return {
        "condition": torch.randn(count, 3, *size, generator=g).to(device),
        "seeds": torch.arange(count, device=device) + 10 * seed,
        "known": known.to(device),
        "mask": mask.to(device),
    }


def told(seed: int, count: int = 2, device: str = "cpu") -> dict[str, Any]:
    """Label and condition level of a call."""
    label = (torch.arange(count) + seed) % 4
    return {"label": label.to(device), "level": (0.5 + label / 10).to(device)}


def draw(sampler: Sampler, **arguments: Any) -> Tensor:
    return sampler.sample(arguments.pop("condition"), **arguments)


KINDS = {
    "unet": ("unet", {}),
    "sr3": ("sr3", {}),
    "tiled": ("tiled", {}),
    "labels": ("told", {}),
    "guided": ("told", {"guidance": 2.0}),
    "half": ("unet", {"dtype": torch.bfloat16}),
    **{solver: ("unet", {"solver": solver}) for solver in SOLVERS},
    "ddim with noise": ("unet", {"solver": "ddim", "eta": 0.7}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_the_called_ones(kind: str, taped: TapedGraphs) -> None:
    """To the bit, in two shapes in turn, with all that is given changed from call to call."""
    name, options = KINDS[kind]
    network = make_network(name)
    size = (8, 13) if name == "tiled" else (8, 8)
    captured, called = (Sampler(network, LEVELS, graph=g, **options) for g in (True, False))
    found = []
    for seed, count in ((1, 2), (2, 3), (3, 2), (4, 3), (1, 2)):
        call = make_call(seed, count, size)
        if name == "told":
            call |= told(seed, count)
        found.append(draw(captured, **call))
        assert torch.equal(found[-1], draw(called, **call))
    assert taped.captured == 2
    assert taped.replayed == 5 * 5 - 2  # all steps but the first of each shape
    assert torch.equal(found[0], found[4])
    assert not torch.equal(found[0], found[2])


def test_given_noises_and_previews_go_through_a_graph(taped: TapedGraphs) -> None:
    network = make_network("unet")
    captured, called = (Sampler(network, LEVELS, solver="ddpm", graph=g) for g in (True, False))
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        call = {**make_call(seed), "noises": list(torch.randn(4, 2, 3, 8, 8, generator=g))}
        shown: list[list[Tensor]] = [[], []]
        for sampler, frames in zip((captured, called), shown, strict=True):
            draw(sampler, **call, on_step=lambda i, x0, to=frames: to.append(x0.clone()))
        assert torch.equal(torch.stack(shown[0]), torch.stack(shown[1]))
    assert taped.captured == 1


def test_a_stopped_call_leaves_the_graph_as_it_was(taped: TapedGraphs) -> None:
    sampler = Sampler(make_network("unet"), LEVELS, solver="unipc")
    whole = draw(sampler, **make_call(1))
    for last in range(5):
        with pytest.raises(sampler_module.CancelledError):
            draw(sampler, **make_call(2), on_step=lambda i, image, last=last: i < last)
        assert torch.equal(draw(sampler, **make_call(1)), whole)


def test_captured_anew_when_what_it_holds_has_changed(
    taped: TapedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network("told")
    sampler = Sampler(network, LEVELS, guidance=2.0)
    call = {**make_call(1), **told(1)}

    def captured() -> int:
        """Graphs of one more call, whose picture must be that of a sampler made now."""
        before = taped.captured
        fresh = Sampler(sampler.network, sampler.levels, guidance=sampler.guidance, graph=False)
        fresh.table = sampler.table
        assert torch.equal(draw(sampler, **call), draw(fresh, **call))
        return taped.captured - before

    assert [captured(), captured()] == [1, 0]
    with torch.no_grad():
        network.out[-1].weight.mul_(0.5)
    assert captured() == 0  # other numbers in the same place
    sampler.table = sampler.table * 0.9
    assert captured() == 0  # copied in
    network.out[-1].weight = nn.Parameter(network.out[-1].weight * 0.5)
    assert captured() == 1
    sampler.guidance = 3.0
    assert captured() == 1
    sampler.network = make_network("told")
    assert captured() == 1
    del call["known"], call["mask"]
    assert captured() == 1
    call |= {"label": torch.tensor([1, 1]), "level": torch.tensor([0.5, 0.5])}
    assert captured() == 0  # one kind of image in place of two
    if ops.default("group_norm_silu", "cpu") != "reference":
        with ops.use("reference"):
            assert captured() == 1
    for count in range(1, 9):
        draw(sampler, **make_call(1, count), **told(1, count))
    assert len(sampler._kept) == 4


def test_what_is_captured_and_what_is_called() -> None:
    gpu, network = torch.device("cuda"), make_network("unet")
    assert Sampler(network, LEVELS)._captures(gpu)
    assert Sampler(Tiled(network, (8, 8)), LEVELS)._captures(gpu)
    assert not Sampler(network, LEVELS)._captures(torch.device("cpu"))
    assert not Sampler(network, LEVELS, graph=False)._captures(gpu)
    assert not Sampler(pointwise, LEVELS)._captures(gpu)
    assert not Sampler(torch.compile(network), LEVELS)._captures(gpu)
    hook = network.out.register_forward_hook(lambda *arguments: None)
    assert not Sampler(network, LEVELS)._captures(gpu)
    hook.remove()
    assert Sampler(network, LEVELS)._captures(gpu)


def test_work_is_done_once_then_captured_then_replayed() -> None:
    done: list[str] = []

    class Recorded(TapedGraphs):
        def warm_up(self, work: Callable[[], None]) -> None:
            work()

        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            done.append("capture")
            return lambda: done.append("replay")

    repeated = Repeated(Recorded())
    for _ in range(4):
        repeated.do(lambda: done.append("work"))
    assert done == ["work", "capture", "replay", "replay", "replay"]


def test_what_cannot_be_captured_is_named_with_its_remedy() -> None:
    class Refusing(TapedGraphs):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    repeated = Repeated(Refusing())
    repeated.do(lambda: None)
    with pytest.raises(ValueError, match=r"graph is True, expected False .*capturing\)$"):
        repeated.do(lambda: None)


def test_what_is_no_longer_kept_is_freed_at_once(taped: TapedGraphs) -> None:
    """Buffers and graph hold gigabytes: none of them may wait for the cycle collector."""
    sampler = Sampler(make_network("unet"), LEVELS)
    draw(sampler, **make_call(1, 1))
    buffers = weakref.ref(next(iter(sampler._kept.values())).buffers.state)
    gc.disable()
    try:
        for count in (2, 3, 4, 5):
            draw(sampler, **make_call(1, count))
        assert buffers() is None
    finally:
        gc.enable()


class OnTheDevice(TorchDispatchMode):
    """Refuses tensors of the host; the device is meta."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tensors((args, kwargs, result)):
            assert each.is_meta, f"{func} meets a tensor of the host"
        return result


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["unet", "sr3", "tiled", "any"])
def test_the_loop_neither_asks_nor_feeds_the_device(
    solver: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meta tensor has no value to be read, and what comes from the host is none."""
    for module in (layers, sr3):  # its reference knows no autocast there
        monkeypatch.setattr(module, "attention", lambda qkv, *_: qkv.chunk(3, dim=1)[0])
    network: Any = pointwise if name == "any" else make_network(name).to("meta")
    call = make_call(1, size=(8, 13), device="meta")
    absent = dict.fromkeys(("label", "level", "initial", "noises"))
    arguments = Arguments.checked(**call, **absent, channels=3)
    with torch.no_grad():
        steps = Sampler(network, LEVELS, solver=solver)._run(arguments, wants_x0=True)
        next(steps)
        with OnTheDevice():
            assert len(list(steps)) == 4


class Addresses(TorchDispatchMode):
    """Where the tensors lie that the operations of a step work on and, of these, the new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[str, int]]] = [[]]
        self.made: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = tensors((args, kwargs))
        result = func(*args, **(kwargs or {}))
        places = [(str(func), address(each)) for each in (*given, *tensors(result))]
        self.steps[-1] += places
        if {at for _, at in places} - {*map(address, given)}:
            self.made.append(str(func))
        return result


@pytest.fixture
def step_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """``reverse_step`` as one operation, also where its reference does it in many."""
    whole = ops.reverse_step

    def closed(*arguments: Any, **options: Any) -> None:
        with _disable_current_modes():
            whole(*arguments, **options)
        for each in tensors((arguments, options)):
            each.detach()  # an operation that a mode sees

    monkeypatch.setattr(ops, "reverse_step", closed)


class Answering(nn.Module):
    """A network whose answer is always in the same place, and none of the engine's business."""

    num_classes = 4

    def __init__(self, embeds: bool) -> None:
        super().__init__()
        self.answer = torch.zeros(2, 3, 8, 8)
        self.embeds = embeds

    def __getattr__(self, name: str) -> Any:
        if name in ("embed", "body") and self.embeds:
            return {"embed": self.rows, "body": self.forward}[name]
        return super().__getattr__(name)

    def rows(self, gamma: Tensor, label: Tensor) -> Tensor:
        return gamma[:, None] + label[:, None]

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        with _disable_current_modes():
            scale = sum(each.float().flatten()[0] for each in told)
            self.answer.copy_(torch.sin(x[:, 3:] * scale))
        return self.answer


@pytest.mark.usefixtures("step_by_itself")
@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "ddpm"])
def test_every_step_of_every_call_works_in_the_same_places(
    solver: str, guidance: float, embeds: bool
) -> None:
    """And the engine allocates nothing in it, nor reads anything."""
    sampler = Sampler(Answering(embeds), LEVELS, solver=solver, guidance=guidance)
    mode = Addresses()

    def next_step(i: int, image: Tensor) -> None:
        if i == 0:
            mode.__enter__()
        elif i < 4:
            mode.steps.append([])
        else:
            mode.__exit__(None, None, None)
            mode.steps.append([])

    for seed in (1, 2, 3):
        draw(sampler, **make_call(seed), label=torch.tensor([seed, 0]), on_step=next_step)
    steps = [each for each in mode.steps if each]
    assert len(steps) == 3 * 4
    assert all(each == steps[0] for each in steps)
    assert not mode.made
    assert not any("_local_scalar_dense" in name for name, _ in steps[0])


def test_called_inside_and_outside_of_inference_mode() -> None:
    sampler = Sampler(make_network("unet"), LEVELS)
    with torch.inference_mode():
        inside = draw(sampler, **make_call(1))
    assert torch.equal(draw(sampler, **make_call(1)), inside)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_run_is_the_called_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the tape: to the bit, two shapes in turn, and the first call again at the end."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    name, options = KINDS[kind]
    network = make_network(name).cuda()
    size = (8, 13) if name == "tiled" else (8, 8)
    captured, called = (Sampler(network, LEVELS, graph=g, **options) for g in (True, False))
    found = []
    for seed, count in ((1, 2), (2, 3), (3, 2), (4, 3), (1, 2)):
        call = make_call(seed, count, size, "cuda")
        if name == "told":
            call |= told(seed, count, "cuda")
        found.append(draw(captured, **call))
        assert torch.equal(found[-1], draw(called, **call))
    assert len(captured._kept) == 2
    assert torch.equal(found[0], found[4])
    assert not torch.equal(found[0], found[2])


@needs_gpu
def test_given_noises_previews_and_other_weights_on_a_gpu() -> None:
    network = make_network("unet").cuda()
    captured, called = (Sampler(network, LEVELS, solver="ddpm", graph=g) for g in (True, False))
    for seed in (1, 2):
        noises = torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).cuda()
        call = {**make_call(seed, device="cuda"), "noises": noises}
        shown: list[list[Tensor]] = [[], []]
        for sampler, frames in zip((captured, called), shown, strict=True):
            draw(sampler, **call, on_step=lambda i, x0, to=frames: to.append(x0.clone()))
        assert torch.equal(torch.stack(shown[0]), torch.stack(shown[1]))
        with torch.no_grad():
            network.out[-1].weight.mul_(0.5)


@needs_gpu
def test_graphs_of_one_sampler_share_memory_and_give_it_back() -> None:
    network = make_network("unet").cuda()
    sampler = Sampler(network, LEVELS)
    for count in range(1, 9):
        draw(sampler, **make_call(1, count, device="cuda"))
    (graphs,) = sampler._graphs.values()
    assert len(graphs._alive) == 4
    assert len({graph.pool() for graph in graphs._alive}) == 1
    sampler._kept.clear()
    assert not graphs._alive
    assert torch.equal(
        draw(sampler, **make_call(2, device="cuda")),
        draw(Sampler(network, LEVELS, graph=False), **make_call(2, device="cuda")),
    )


READING = """
import torch
from palette.diffusion.sampler import Sampler

class Reading(torch.nn.Module):
    def embed(self, gamma):
        return gamma[:, None]

    def body(self, x, row):
        return x[:, :3] * float(row.sum())

condition = torch.zeros(1, 3, 8, 8, device="cuda")
levels = [0.1, 0.3, 0.6, 1.0]
before = torch.cuda.current_stream()
try:
    Sampler(Reading(), levels).sample(condition, seeds=[0])
except ValueError as error:
    print(error)
assert torch.cuda.current_stream() == before
print(Sampler(Reading(), levels, graph=False).sample(condition, seeds=[0]).isfinite().all())
"""


@needs_gpu
def test_a_network_that_reads_its_values_is_refused_on_a_gpu() -> None:
    """In a process of its own, since a failed capture may leave the allocator in a bad state."""
    ran = subprocess.run([sys.executable, "-c", READING], capture_output=True, text=True)
    said = ran.stdout.splitlines()
    assert said, ran.stderr
    assert said[0].startswith("graph is True, expected False for a network")
    assert "True" in said[1]
