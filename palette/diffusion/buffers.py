"""What one call of the sampler works on: its checked arguments, and buffers that stay in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palette import ops


@dataclass(frozen=True)
class Buffers:
    """What a group of images of one shape needs at every step, at addresses that never change."""

    inputs: Tensor  # [N, C'+C, H, W] in the network's dtype, channels-last
    slot: Tensor  # its last C channels
    state: Tensor  # [N, C, H, W] float32, channels-last
    history: Tensor | None  # like state: x0 of the step before
    older: Tensor | None  # like state: x0 of two steps before
    step: Tensor  # int64 scalar

    @classmethod
    def empty(cls, arguments: Arguments, history: int, dtype: torch.dtype) -> Buffers:
        """Allocate for so many images, with x0 of ``history`` steps (0, 1 or 2) kept."""
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
            older=torch.empty_like(state) if history > 1 else None,
            step=torch.zeros((), dtype=torch.int64, device=device),
        )

    def start(self, arguments: Arguments) -> None:
        """Set everything for the first step."""
        self.step.zero_()
        for kept in (self.history, self.older):
            if kept is not None:
                kept.zero_()
        state = arguments.initial
        if state is None:
            state = ops.noise(arguments.seeds, 0, arguments.shape[1:])
            if arguments.known is not None and arguments.mask is not None:
                state = arguments.known * (1.0 - arguments.mask) + arguments.mask * state
        self.state.copy_(state)
        self.inputs[:, : self.inputs.shape[1] - state.shape[1]].copy_(arguments.condition)
        self.slot.copy_(state)

    def look_back(self, two_ago: Tensor) -> None:
        """Before a step of a solver that looks back two steps: add the older x0 to the history.

        ``two_ago`` [S, 1] holds the weight of the older x0 relative to the newer, per step.
        """
        if self.history is None or self.older is None:
            return
        weight = two_ago.index_select(0, self.step.view(1)).view(1, 1, 1, 1)
        both = torch.addcmul(self.history, self.older, weight)
        self.older.copy_(self.history)
        self.history.copy_(both)


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
            mask = _float(_shaped("mask", mask, (count, 1, height, width)))
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
            known=None if known is None else _float(known),
            mask=mask,
            label=None if label is None else _shaped("label", label, (count,)),
            level=None if level is None else _shaped("level", level, (count,)),
            initial=initial,
            noises=None if noises is None else [_float(noise) for noise in noises],
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


def _float(image: Tensor) -> Tensor:
    """The image as float32 in the layout of the buffers."""
    return image.to(torch.float32).contiguous(memory_format=torch.channels_last)


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
