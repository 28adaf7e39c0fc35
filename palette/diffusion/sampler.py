"""The step engine: walks a network from noise to images, one ``ops.reverse_step`` a step.

All levels are known in advance, so the noise-level embeddings of every step are computed before the
loop where the network allows it. Inside the loop nothing is read back by the host, the step counter
lives on the device, and each step writes its result straight into the next network input.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from palette import ops
from palette.diffusion.buffers import Arguments, Buffers
from palette.diffusion.schedule import Array
from palette.diffusion.solvers import REGRESSION, coefficients

OnStep = Callable[[int, Tensor], object]
"""``on_step(i, image)`` after step i (from 0), image float32 [N, C, H, W]: the clean image
predicted in this step, or the state after it. The next step overwrites it: clone what to keep."""

KEPT_BUFFERS = 4
"""How many shapes a sampler keeps buffers for."""


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
        solver: "dpmpp_2m", "unipc", "ddim" or "ddpm".
        prediction: what the network answers: "epsilon", "x0", "v", or "regression", which is one
            evaluation and begins with zeros.
        eta: share of fresh noise, for ``ddim`` only.
        guidance: weight of the label (classifier-free guidance, Ho and Salimans 2022): the answer
            is null + guidance * (labelled - null), two evaluations a step unless it is 1.
        dtype: of the network input. A network whose weights have another dtype runs under
            autocast; the state is float32 in any case.

    Buffers are kept for the last few shapes. One sampler serves one call at a time.

    Raises ValueError for an argument that makes no sense (see ``solvers.coefficients``).
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        levels: Array,
        *,
        solver: str = "dpmpp_2m",
        prediction: str = "epsilon",
        eta: float = 0.0,
        guidance: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = network
        self.levels: Array = np.asarray(levels, dtype=np.float64)
        self._regresses = prediction == REGRESSION
        if self._regresses and len(self.levels) != 2:
            raise ValueError(f"levels has {len(self.levels)} entries, expected 2 for a regression")
        self.table = coefficients(solver, self.levels, prediction, eta)
        self.guidance = guidance
        self.dtype = dtype
        self.steps: int = self.table.shape[0]
        self._history = 2 if self.table.shape[1] > 6 else int((self.table[:, 4] != 0.0).any())
        self._draws_noise = bool((self.table[:, 5] != 0.0).any())
        self._buffers: OrderedDict[tuple[object, ...], Buffers] = OrderedDict()

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

        Raises ValueError for shapes or numbers that do not fit each other, CancelledError when
        ``on_step`` returned False; exceptions of ``on_step`` itself pass through.
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
        device = arguments.condition.device
        columns = torch.from_numpy(self.table.astype(np.float32)).to(device)
        table, two_ago = columns[:, :6].contiguous(), columns[:, 6:]
        buffers = self._buffers_for(arguments, max(self._history, int(wants_x0)))
        buffers.start(arguments)
        evaluate = self._evaluator(arguments)
        draws = self._draws_noise and arguments.noises is None
        for i in range(self.steps):
            buffers.look_back(two_ago)
            ops.reverse_step(
                buffers.state,
                evaluate(buffers.inputs, buffers.step),
                table,
                buffers.step,
                seeds=arguments.seeds if draws else None,
                noise=arguments.noise(i),
                history=buffers.history,
                known=arguments.known,
                mask=arguments.mask,
                slot=buffers.slot,
            )
            buffers.step.add_(1)
            yield buffers.history, buffers.state

    def _evaluator(self, arguments: Arguments) -> Callable[[Tensor, Tensor], Tensor]:
        """The network as a function of (input, device step), guidance included."""
        labelled = self._branch(arguments, arguments.label)
        if self.guidance == 1.0:
            return labelled
        classes = getattr(self.network, "num_classes", None)
        if arguments.label is None or classes is None:
            raise ValueError(
                f"guidance is {self.guidance}, expected 1 without labels and num_classes"
            )
        unlabelled = self._branch(arguments, torch.full_like(arguments.label, classes))

        def guided(x: Tensor, step: Tensor) -> Tensor:
            return torch.lerp(unlabelled(x, step).float(), labelled(x, step).float(), self.guidance)

        return guided

    def _branch(
        self, arguments: Arguments, label: Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The network with one label per image, its embeddings computed ahead if it offers them."""
        network: Any = self.network
        count, device = arguments.seeds.shape[0], arguments.seeds.device
        gammas = torch.from_numpy(self.levels[:-1].astype(np.float32)).to(device)

        # A compiled module passes the names of the one inside through, uncompiled.
        if hasattr(network, "embed") and hasattr(network, "body") and not _compiled(network):
            rows, which = self._rows(gammas, label, arguments.level, count)

            def embedded(x: Tensor, step: Tensor) -> Tensor:
                row = rows.index_select(0, step.view(1)).squeeze(0).index_select(0, which)
                output: Tensor = network.body(x, row)  # row is [N, E]
                return output

            return embedded

        labels = () if label is None else (label,)
        told = {} if arguments.level is None else {"level": arguments.level}

        def plain(x: Tensor, step: Tensor) -> Tensor:
            gamma = gammas.index_select(0, step.view(1)).expand(count)
            output: Tensor = network(x, gamma, *labels, **told)
            return output

        return plain

    def _rows(
        self, gammas: Tensor, label: Tensor | None, level: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [S, K, E] of every step for K kinds of images, and the kind of each image."""
        network: Any = self.network
        known = [each.double() for each in (label, level) if each is not None]
        if not known:
            which = torch.zeros(count, dtype=torch.int64, device=gammas.device)
            return network.embed(gammas)[:, None], which
        kinds, which = torch.unique(torch.stack(known, dim=1), dim=0, return_inverse=True)
        rows = []
        for kind in kinds:  # one call a kind: the bits do not depend on the images beside it
            every = kind.expand(self.steps, -1)
            labels = () if label is None else (every[:, 0].long(),)
            told = {} if level is None else {"level": every[:, -1].to(gammas.dtype)}
            rows.append(network.embed(gammas, *labels, **told))
        return torch.stack(rows, dim=1), which

    @contextlib.contextmanager
    def _evaluation(self, device: torch.device) -> Iterator[None]:
        """The network in evaluation mode, and under autocast where its weights differ in dtype."""
        network = self.network
        parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
        weights = {p.dtype for p in parameters if p.is_floating_point()}
        half = self.dtype in (torch.bfloat16, torch.float16)
        training = isinstance(network, nn.Module) and network.training
        if isinstance(network, nn.Module) and training:
            network.eval()
        try:
            with torch.autocast(
                device.type,
                dtype=self.dtype if half else None,
                enabled=half and weights != {self.dtype},
            ):
                yield
        finally:
            if isinstance(network, nn.Module) and training:
                network.train()

    def _noises(self, given: Tensor | Sequence[Tensor] | None) -> list[Tensor] | None:
        if given is None:
            return None
        noises = list(given)
        needed = self.steps - int(self.table[-1, 5] == 0.0)
        if not needed <= len(noises) <= self.steps:
            raise ValueError(f"noises has {len(noises)} entries, expected {needed}")
        return noises

    def _buffers_for(self, arguments: Arguments, history: int) -> Buffers:
        key = (*arguments.condition.shape, *arguments.shape, history, arguments.condition.device)
        if key not in self._buffers:
            self._buffers[key] = Buffers.empty(arguments, history, self.dtype)
            if len(self._buffers) > KEPT_BUFFERS:
                self._buffers.popitem(last=False)
        self._buffers.move_to_end(key)
        return self._buffers[key]


def _compiled(network: object) -> bool:
    """Whether ``torch.compile`` made this module."""
    return hasattr(network, "_orig_mod")
