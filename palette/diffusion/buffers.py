"""What one call of the sampler works on: its checked arguments, and buffers that stay in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palette import ops


@dataclass(frozen=True)
class Buffers:
    """What a group of images of one shape needs at every step, at addresses that never change.

    A captured step knows a tensor by its address alone, so what a call is given is copied in.
    """

    inputs: Tensor  # [N, C'+C, H, W] in the network's dtype, channels-last
    slot: Tensor  # its last C channels
    state: Tensor  # [N, C, H, W] float32, channels-last
    history: Tensor | None  # like state: x0 of the step before
    older: Older | None
    step: Tensor  # int64 scalar
    table: Tensor  # [S, 6] float32
    seeds: Tensor  # int64 [N]
    known: Tensor | None  # like state
    mask: Tensor | None  # [N, 1, H, W] float32
    noise: Tensor | None  # like state: what is given for the step

    @classmethod
    def empty(cls, arguments: Arguments, steps: int, history: int, dtype: torch.dtype) -> Buffers:
        """Allocate for so many images and steps, with x0 of ``history`` (0, 1 or 2) kept."""
        count, extra, height, width = arguments.condition.shape
        device, layout = arguments.condition.device, torch.channels_last
        channels = extra + arguments.shape[1]
        inputs = torch.empty(
            (count, channels, height, width), dtype=dtype, device=device, memory_format=layout
        )
        state = torch.empty(arguments.shape, device=device, memory_format=layout)
        return cls(
            inputs=inputs,
            slot=inputs[:, extra:],
            state=state,
            history=torch.empty_like(state) if history > 0 else None,
            older=Older.empty(state, steps) if history > 1 else None,
            step=torch.zeros((), dtype=torch.int64, device=device),
            table=state.new_empty(steps, 6),
            seeds=torch.empty_like(arguments.seeds),
            known=None if arguments.known is None else torch.empty_like(state),
            mask=None if arguments.mask is None else state.new_empty(count, 1, height, width),
            noise=None if arguments.noises is None else torch.empty_like(state),
        )

    def start(self, arguments: Arguments, table: Tensor) -> None:
        """Set everything for the first step; ``table`` [S, 6 or 7] is a solver's."""
        self.step.zero_()
        self.table.copy_(table[:, :6])
        self.seeds.copy_(arguments.seeds)
        if self.history is not None:
            self.history.zero_()
        if self.older is not None:
            self.older.x0.zero_()
            self.older.weights.copy_(table[:, 6])
        state = arguments.initial
        if state is None:
            state = ops.noise(self.seeds, 0, arguments.shape[1:])
        if arguments.known is not None and self.known is not None:
            self.known.copy_(arguments.known)
        if arguments.mask is not None and self.mask is not None:
            self.mask.copy_(arguments.mask)
        if arguments.initial is None and self.known is not None and self.mask is not None:
            state = self.known * (1.0 - self.mask) + self.mask * state
        self.state.copy_(state)
        self.inputs[:, : self.inputs.shape[1] - state.shape[1]].copy_(arguments.condition)
        self.slot.copy_(state)

    def take_noise(self, given: Tensor | None) -> None:
        """Before a step of a call that is given noise: that of this step, None for none."""
        if self.noise is None:
            return
        if given is None:
            self.noise.zero_()
        else:
            self.noise.copy_(given)

    def look_back(self) -> None:
        """Before a step of a solver that looks back two steps: add the older x0 to the history."""
        if self.history is not None and self.older is not None:
            self.older.join(self.history, self.step)


@dataclass(frozen=True)
class Older:
    """x0 of two steps before."""

    x0: Tensor  # [N, C, H, W]
    weights: Tensor  # [S]: of it relative to the newer x0, per step
    weight: Tensor  # [1]: that of the step
    both: Tensor  # like x0

    @classmethod
    def empty(cls, state: Tensor, steps: int) -> Older:
        return cls(
            x0=torch.empty_like(state),
            weights=state.new_empty(steps),
            weight=state.new_empty(1),
            both=torch.empty_like(state),
        )

    def join(self, history: Tensor, step: Tensor) -> None:
        """Add the older x0 to ``history``, the newer, which becomes the older one."""
        torch.index_select(self.weights, 0, step.view(1), out=self.weight)
        torch.addcmul(history, self.x0, self.weight, out=self.both)
        self.x0.copy_(history)
        history.copy_(self.both)


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of one call; tensors have one entry per image."""

    condition: Tensor
    seeds: Tensor  # int64
    shape: tuple[int, int, int, int]  # of the result
    known: Tensor | None
    mask: Tensor | None
    label: Tensor | None
    level: Tensor | None  # of the condition
    initial: Tensor | None
    noises: list[Tensor] | None

    @classmethod
    def checked(
        cls,
        condition: Tensor,
        seeds: Tensor | Sequence[int],
        channels: int,
        known: Tensor | None,
        mask: Tensor | None,
        label: Tensor | None,
        level: Tensor | None,
        initial: Tensor | None,
        noises: list[Tensor] | None,
    ) -> Arguments:
        if condition.dim() != 4:
            raise ValueError(f"condition has shape {list(condition.shape)}, expected [N, C', H, W]")
        count, _, height, width = condition.shape
        shape = (count, channels, height, width)
        if (known is None) != (mask is None):
            raise ValueError("known and mask belong together, expected both or neither")
        if mask is not None:
            _shaped("mask", mask, (count, 1, height, width))
        expected = {"known": known, "initial": initial}
        for i, noise in enumerate(noises or ()):
            expected[f"noises[{i}]"] = noise
        for name, value in expected.items():
            if value is not None:
                _shaped(name, value, shape)
        return cls(
            condition=condition,
            seeds=_seeds(seeds, count, condition.device),
            shape=shape,
            known=known,
            mask=mask,
            label=None if label is None else _shaped("label", label, (count,)),
            level=None if level is None else _shaped("level", level, (count,)),
            initial=initial,
            noises=noises,
        )

    def noise(self, step: int) -> Tensor | None:
        """What was given for a step."""
        return self.noises[step] if self.noises is not None and step < len(self.noises) else None

    def part(self, rows: slice) -> Arguments:
        """The arguments of some of the images."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        condition = self.condition[rows]
        return Arguments(
            condition=condition,
            seeds=self.seeds[rows],
            shape=(len(condition), *self.shape[1:]),
            known=cut(self.known),
            mask=cut(self.mask),
            label=cut(self.label),
            level=cut(self.level),
            initial=cut(self.initial),
            noises=None if self.noises is None else [noise[rows] for noise in self.noises],
        )


def _shaped(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
    return value


def _seeds(seeds: Tensor | Sequence[int], count: int, device: torch.device) -> Tensor:
    """Seeds as int64 [N]; integers of up to 64 bits wrap into the sign."""
    if not isinstance(seeds, Tensor):
        signed = [(int(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
        seeds = torch.tensor(signed, dtype=torch.int64)
    if seeds.dtype != torch.int64 or tuple(seeds.shape) != (count,):
        raise ValueError(
            f"seeds is {seeds.dtype} of shape {list(seeds.shape)}, expected int64 [{count}],"
            " one per image of the condition"
        )
    return seeds.to(device)
