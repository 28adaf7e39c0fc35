"""The network as the step engine calls it: a function of the input and the step on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palette.diffusion.reuse import Reuse

Told = dict[str, Tensor]
"""What a network is told beside its input: either ``rows`` [S, K, E], its embeddings of all S steps
for up to K kinds of images, and ``which`` int64 [N], the kind of each image; or ``gammas`` [S] and,
where they are given, ``label`` [N] and ``level`` [N]. K is 1 where neither is given, otherwise N:
the shapes say nothing of which images are of one kind."""


def embeds(network: object) -> bool:
    """Whether the network offers ``embed`` and ``body``, so that embeddings leave the loop."""
    # A compiled module passes the names of the one inside through, uncompiled.
    compiled = hasattr(network, "_orig_mod")
    return hasattr(network, "embed") and hasattr(network, "body") and not compiled


def tell(
    network: Any, gammas: Tensor, count: int, label: Tensor | None, level: Tensor | None
) -> Told:
    """What ``network`` is told at the noise levels ``gammas`` [S] of so many images."""
    if embeds(network):
        rows, which = _rows(network, gammas, count, label, level)
        return {"rows": rows, "which": which}
    told = {"gammas": gammas, "label": label, "level": level}
    return {name: each for name, each in told.items() if each is not None}


def _rows(
    network: Any, gammas: Tensor, count: int, label: Tensor | None, level: Tensor | None
) -> tuple[Tensor, Tensor]:
    known = [each.double() for each in (label, level) if each is not None]
    if not known:
        which = torch.zeros(count, dtype=torch.int64, device=gammas.device)
        return network.embed(gammas)[:, None], which
    kinds, which = torch.unique(torch.stack(known, dim=1), dim=0, return_inverse=True)
    rows = []
    for kind in kinds:  # one call a kind: the bits do not depend on the images beside it
        every = kind.expand(len(gammas), -1)
        labels = () if label is None else (every[:, 0].long(),)
        told = {} if level is None else {"level": every[:, -1].to(gammas.dtype)}
        rows.append(network.embed(gammas, *labels, **told))
    # One shape for any mixture of kinds, so that buffers and graph are found again.
    rows += rows[:1] * (count - len(rows))
    return torch.stack(rows, dim=1), which


class Evaluator:
    """Calls the network on tensors that stay in place, guidance included.

    Args:
        network: as for ``sampler.Sampler``.
        told: what the network is told in each evaluation of a step, of which there are one or,
            with guidance, two: without the label, and with it. Copies like these are kept.
        guidance: weight of the second, see ``sampler.Sampler``.
        state: [N, C, H, W] float32, like the answers of a guided step.
        reuse: every so many steps one is whole, see ``sampler.Sampler``.
    """

    def __init__(
        self,
        network: object,
        told: Sequence[Told],
        guidance: float,
        state: Tensor,
        reuse: int = 1,
    ) -> None:
        self._reusing = [Reuse(network, reuse) for _ in told] if reuse > 1 else []
        networks: list[object] = [*self._reusing] or [network] * len(told)
        branch = _Embedded if embeds(network) else _Plain
        self._branches = [
            branch(own, each, len(state)) for own, each in zip(networks, told, strict=True)
        ]
        self._guidance = guidance
        self._answers = [torch.empty_like(state) for _ in told] if len(told) > 1 else []

    def start(self, told: Sequence[Told]) -> None:
        """Take over what the network is told in this call."""
        for network in self._reusing:
            network.start()
        for branch, new in zip(self._branches, told, strict=True):
            for name, each in new.items():
                branch.told[name].copy_(each)

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        """The answer [N, C, H, W] to x [N, C'+C, H, W] at ``step``, an int64 scalar."""
        if not self._answers:
            return self._branches[0](x, step)
        for branch, answer in zip(self._branches, self._answers, strict=True):
            answer.copy_(branch(x, step))
        unlabelled, labelled = self._answers
        return unlabelled.lerp_(labelled, self._guidance)


class _Branch:
    """One evaluation of a step."""

    def __init__(self, network: Any, told: Told) -> None:
        self.network = network
        self.told = {
            name: torch.empty(each.shape, dtype=each.dtype, device=each.device)
            for name, each in told.items()
        }


class _Embedded(_Branch):
    """Of a network with ``embed`` and ``body``."""

    def __init__(self, network: Any, told: Told, count: int) -> None:
        super().__init__(network, told)
        _, self._kinds, width = told["rows"].shape
        self._place = told["which"].new_empty(count)
        self._row = told["rows"].new_empty(count, width)

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        torch.add(self.told["which"], step, alpha=self._kinds, out=self._place)
        rows = self.told["rows"].flatten(0, 1)
        torch.index_select(rows, 0, self._place, out=self._row)
        output: Tensor = self.network.body(x, self._row)
        return output


class _Plain(_Branch):
    """Of any other."""

    def __init__(self, network: Any, told: Told, count: int) -> None:
        super().__init__(network, told)
        self._gamma = told["gammas"].new_empty(count)
        self._labels = [self.told["label"]] if "label" in told else []
        self._level = {"level": self.told["level"]} if "level" in told else {}

    def __call__(self, x: Tensor, step: Tensor) -> Tensor:
        index = step.expand(len(self._gamma))
        torch.index_select(self.told["gammas"], 0, index, out=self._gamma)
        output: Tensor = self.network(x, self._gamma, *self._labels, **self._level)
        return output
