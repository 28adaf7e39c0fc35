"""The step engine: walks a network from noise to images, one ``ops.reverse_step`` a step.

All levels are known in advance, so the noise-level embeddings of every step are computed before the
loop where the network allows it. Inside the loop nothing is read back by the host, the step counter
lives on the device, and each step writes its result straight into the next network input. All that
a step reads lies in buffers that stay in place, so on a GPU the whole step is one CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from palette import ops
from palette.diffusion.buffers import Arguments, Buffers
from palette.diffusion.evaluator import Evaluator, Told, embeds, tell
from palette.diffusion.graph import Graphs, Repeated
from palette.diffusion.reuse import reusable
from palette.diffusion.schedule import Array
from palette.diffusion.solvers import REGRESSION, coefficients
from palette.diffusion.steps import Steps

OnStep = Callable[[int, Tensor], object]
"""``on_step(i, image)`` after step i (from 0), image float32 [N, C, H, W]: the clean image
predicted in this step, or the state after it. The next step overwrites it: clone what to keep."""

KEPT_SHAPES = 4
"""How many kinds of calls a sampler keeps buffers and a graph for."""


class CancelledError(Exception):
    """``on_step`` returned False."""


class Sampler:
    """Draws images from a network along a fixed grid of noise levels.

    Args:
        network: called as ``network(x, gamma)`` or, with labels, ``network(x, gamma, label)``, and
            with ``level=`` where it is told how noisy its condition is. x is [N, C'+C, H, W]
            (condition first, then the noisy image), gamma float32 [N] in (0, 1], label int64 [N];
            returns [N, C, H, W]. Where it offers ``embed(gamma, ...)`` and
            ``body(x, embedding)``, the embeddings of all steps are computed once.
        levels: float64 [S+1], increasing, from ``schedule.spaced`` or ``schedule.published``.
        solver: "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim" or "ddpm".
        prediction: what the network answers: "epsilon", "x0", "v", or "regression", which is one
            evaluation and begins with zeros.
        eta: share of fresh noise, for ``ddim`` only.
        guidance: weight of the label (classifier-free guidance, Ho and Salimans 2022): the answer
            is null + guidance * (labelled - null), two evaluations a step unless it is 1.
        reuse: every so many evaluations one is whole, and the others use its deep features again
            (see ``reuse.Reuse``); 1 is off. The network must offer ``whole`` and ``shallow``.
        dtype: of the network input. A network whose weights have another dtype runs under
            autocast; the state is float32 in any case.
        graph: on a GPU, replay a step as one CUDA graph, captured in the second step of the first
            call of its kind. It is so with a network that offers ``embed`` and ``body`` and has no
            hooks, and without ``reuse``; ``body`` must then do the same at every call and read
            nothing back to the host.
            False: the network is called at every step.

    Buffers and graph are kept for the last few kinds of calls (shapes, and which arguments are
    given). One that finds other weights' addresses or another backend of the ops is captured anew;
    of other changes inside the network a graph knows nothing. One sampler serves one call at a
    time.

    Raises ValueError for an argument that makes no sense (see ``solvers.coefficients``).
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        levels: Array,
        *,
        solver: str = "dpmpp_2m_sde",
        prediction: str = "epsilon",
        eta: float = 0.0,
        guidance: float = 1.0,
        reuse: int = 1,
        dtype: torch.dtype = torch.float32,
        graph: bool = True,
    ) -> None:
        self.network = network
        self.levels: Array = np.asarray(levels, dtype=np.float64)
        self._regresses = prediction == REGRESSION
        if self._regresses and len(self.levels) != 2:
            raise ValueError(f"levels has {len(self.levels)} entries, expected 2 for a regression")
        self.table = coefficients(solver, self.levels, prediction, eta)
        self.guidance = guidance
        if reuse < 1:
            raise ValueError(f"reuse is {reuse}, expected at least 1")
        if reuse > 1 and not (embeds(network) and reusable(network)):
            kind = type(network).__name__
            raise ValueError(f"reuse is {reuse}, expected 1: {kind} has no deep features to reuse")
        self.reuse = reuse
        self.dtype = dtype
        self.steps: int = self.table.shape[0]
        self._history = 2 if self.table.shape[1] > 6 else int((self.table[:, 4] != 0.0).any())
        self._draws_noise = bool((self.table[:, 5] != 0.0).any())
        self.graph = graph
        self._kept: OrderedDict[tuple[object, ...], Steps] = OrderedDict()
        self._graphs: dict[torch.device, Graphs] = {}

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        seeds: Tensor | Sequence[int],
        channels: int = 3,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        label: Tensor | None = None,
        level: Tensor | None = None,
        initial: Tensor | None = None,
        noises: Tensor | Sequence[Tensor] | None = None,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
        preview: Literal["x0", "state"] = "x0",
        progress: bool = False,
    ) -> Tensor:
        """Draw one image per seed, the same in any batch up to the rounding of the network.

        Args:
            condition: [N, C', H, W] in [-1, 1]; C' is 0 for an unconditional network.
            seeds, channels: one 64-bit integer per image, and C of the images.
            known, mask: [N, C, H, W] and [N, 1, H, W] (1 = hole): pixels outside the hole are
                those of ``known`` after every step and, unless ``initial`` is given, before the
                first.
            label: int64 [N].
            level: [N] in (0, 1], the noise level of the condition, for a network that is told it.
            initial: the first state, in place of noise drawn from the seeds.
            noises: [S, N, C, H, W], or a tensor per step, in place of noise drawn from the seeds;
                the last may be missing where the last step draws none.
            batch_size: evaluate at most so many images at once, one group after another.
            on_step: called after every step of every group (see ``OnStep``); returning False
                stops the sampling.
            preview: what ``on_step`` is shown.
            progress: show a bar, if the standard error is a terminal.

        Returns:
            [N, C, H, W] float32, in [-1, 1] where the levels end at 1.0.

        Raises ValueError for shapes or numbers that do not fit each other, or a step that no graph
        can hold; CancelledError when ``on_step`` returned False; exceptions of ``on_step`` itself
        pass through.
        """
        if self._regresses and initial is None:
            initial = condition.new_zeros(
                (len(condition), channels, *condition.shape[2:]), dtype=torch.float32
            )
            if known is not None and mask is not None:
                initial = initial + known * (1.0 - mask)
        arguments = Arguments.checked(
            condition, seeds, channels, known, mask, label, level, initial, self._noises(noises)
        )
        count, device = len(arguments.seeds), condition.device
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        group = max(1, min(batch_size or count, count))
        starts = range(0, count, group)
        result = torch.empty(arguments.shape, dtype=torch.float32, device=device)
        total, hidden = self.steps * len(starts), None if progress else True
        bar = tqdm(total=total, desc="sampling", unit="step", disable=hidden)
        with bar, self._evaluation(device):
            for start in starts:
                rows = slice(start, start + group)
                run = self._run(arguments.part(rows), preview == "x0" and on_step is not None)
                for i, (x0, state) in enumerate(run):
                    bar.update()
                    shown = state if x0 is None or preview == "state" else x0
                    if on_step is not None and on_step(i, shown) is False:
                        raise CancelledError(f"on_step stopped after step {i + 1} of {self.steps}")
                result[rows] = state
        return result

    def _run(self, arguments: Arguments, wants_x0: bool) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (x0 if it is kept, state) after every step for one group of images."""
        told = self._told(arguments)
        steps = self._steps_for(arguments, told, max(self._history, int(wants_x0)))
        steps.start(arguments, torch.from_numpy(self.table.astype(np.float32)), told)
        for i in range(self.steps):
            steps.advance(arguments.noise(i))
            yield steps.buffers.history, steps.buffers.state

    def _told(self, arguments: Arguments) -> list[Told]:
        """What the network is told in each evaluation of a step; see ``Evaluator``."""
        count, device = arguments.shape[0], arguments.condition.device
        gammas = torch.from_numpy(self.levels[:-1].astype(np.float32)).to(device)
        labels = [arguments.label]
        if self.guidance != 1.0:
            classes = getattr(self.network, "num_classes", None)
            if arguments.label is None or classes is None:
                raise ValueError(
                    f"guidance is {self.guidance}, expected 1 without labels and num_classes"
                )
            labels.insert(0, torch.full_like(arguments.label, classes))
        return [tell(self.network, gammas, count, label, arguments.level) for label in labels]

    def _steps_for(self, arguments: Arguments, told: list[Told], history: int) -> Steps:
        """Those of an earlier call of the same kind, or new ones."""
        device = arguments.condition.device
        captures = self._captures(device)
        key = (
            (*arguments.condition.shape, *arguments.shape, device, self.dtype, self.steps, history),
            (arguments.known is None, arguments.noises is None, id(self.network)),
            (self.guidance, self.reuse),
            tuple((name, *each.shape, each.dtype) for one in told for name, each in one.items()),
            self._baked(device) if captures else None,
        )
        if key not in self._kept:
            self._kept[key] = self._new_steps(arguments, told, history, captures)
            if len(self._kept) > KEPT_SHAPES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    # What is written to in a later call must not be an inference tensor, whatever this call is in.
    @torch.inference_mode(False)
    def _new_steps(
        self, arguments: Arguments, told: list[Told], history: int, captures: bool
    ) -> Steps:
        buffers = Buffers.empty(arguments, self.steps, history, self.dtype)
        evaluator = Evaluator(self.network, told, self.guidance, buffers.state, self.reuse)
        repeated = None
        if captures:
            device = arguments.condition.device
            if device not in self._graphs:
                self._graphs[device] = Graphs(device)
            repeated = Repeated(self._graphs[device])
        return Steps(buffers, evaluator, self._draws_noise, repeated)

    def _captures(self, device: torch.device) -> bool:
        """Whether the step is to become a CUDA graph."""
        possible = self.graph and self.reuse == 1 and device.type == "cuda"
        return possible and embeds(self.network) and not _hooked(self.network)

    def _baked(self, device: torch.device) -> tuple[object, ...]:
        """What else a graph remembers: where the weights lie, and by what the ops are done."""
        network = self.network
        tensors = (
            (*network.parameters(), *network.buffers()) if isinstance(network, nn.Module) else ()
        )
        backends = (ops.choose(op, device.type) for op in ops.names())
        return (*((each.data_ptr(), each.dtype) for each in tensors), *backends)

    @contextlib.contextmanager
    def _evaluation(self, device: torch.device) -> Iterator[None]:
        """The network in evaluation mode, and under autocast where its weights differ in dtype."""
        # A function has no weights and no modes, as an empty module has none.
        network = self.network if isinstance(self.network, nn.Module) else nn.Module().eval()
        weights = {p.dtype for p in network.parameters() if p.is_floating_point()}
        half = self.dtype in (torch.bfloat16, torch.float16)
        modes = [(module, module.training) for module in network.modules()]
        if any(training for _, training in modes):
            network.eval()
        try:
            with torch.autocast(
                device.type,
                dtype=self.dtype if half else None,
                enabled=half and weights != {self.dtype},
                # A graph outlives the copies of the weights that autocast would keep.
                cache_enabled=not self._captures(device),
            ):
                yield
        finally:
            for module, training in modes:  # the outer first: train() reaches down
                if module.training != training:
                    module.train(training)

    def _noises(self, given: Tensor | Sequence[Tensor] | None) -> list[Tensor] | None:
        if given is None:
            return None
        noises = list(given)
        needed = self.steps - int(self.table[-1, 5] == 0.0)
        if not needed <= len(noises) <= self.steps:
            raise ValueError(f"noises has {len(noises)} entries, expected {needed}")
        return noises


def _hooked(network: object) -> bool:
    """Whether something besides the network wants to know of each call of it or of a layer."""
    return isinstance(network, nn.Module) and any(
        layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules()
    )
