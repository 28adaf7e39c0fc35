"""The steps of one kind of call: each does the same work on tensors that never move."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from palette import ops
from palette.diffusion.buffers import Arguments, Buffers
from palette.diffusion.evaluator import Evaluator, Told
from palette.diffusion.graph import Repeated


class Steps:
    """Network, guidance, reverse step, look-back and step counter for images of one shape.

    Args:
        buffers: of that shape.
        evaluator: the network.
        draws: the solver draws noise.
        repeated: by which a GPU does the work of a step; None: it is called.
    """

    def __init__(
        self, buffers: Buffers, evaluator: Evaluator, draws: bool, repeated: Repeated | None
    ) -> None:
        self.buffers = buffers
        self._evaluator = evaluator
        self._draws = draws
        self._repeated = repeated

    def start(self, arguments: Arguments, table: Tensor, told: Sequence[Told]) -> None:
        """Copy in what a call is given; the next step is the first."""
        self.buffers.start(arguments, table)
        self._evaluator.start(told)

    def advance(self, noise: Tensor | None) -> None:
        """Take the next step, with ``noise`` [N, C, H, W] where the call is given some."""
        self.buffers.take_noise(noise)
        if self._repeated is None:
            self._step()
        else:
            self._repeated.do(self._step)

    def _step(self) -> None:
        """Everything between two states: nothing here may depend on the step but through tensors.

        Nor may anything be read back: the work is captured once and replayed.
        """
        buffers = self.buffers
        buffers.look_back()
        ops.reverse_step(
            buffers.state,
            self._evaluator(buffers.inputs, buffers.step),
            buffers.table,
            buffers.step,
            seeds=buffers.seeds if self._draws and buffers.noise is None else None,
            noise=buffers.noise,
            history=buffers.history,
            known=buffers.known,
            mask=buffers.mask,
            slot=buffers.slot,
        )
        buffers.step.add_(1)
