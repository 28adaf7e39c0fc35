"""What a feature network is to a metric, and the built-in one, which needs nothing.

A network is known by its :class:`Identity`: name and hash of its weights. The identity is part of
every result and every cached statistic, and features of different identities are never compared.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

DIGEST_SHOWN = 12


@dataclass(frozen=True)
class Identity:
    """Which network, exactly."""

    name: str
    """What it is, where it came from and how it sees a picture (resize), in one line."""
    digest: str
    """SHA-256 of its weights, hexadecimal."""
    stand_in: bool = False
    """Whether it only takes the place of a trained network: its scores say so in their names."""

    def __str__(self) -> str:
        return f"{self.name} [{self.digest[:DIGEST_SHOWN]}]"

    def key(self, metric: str) -> str:
        """What a score of this network is called: "fid", of a stand-in "fid_random"."""
        return f"{metric}_random" if self.stand_in else metric


def check_same(first: Identity, second: Identity, what: str = "statistics") -> None:
    """Raise ValueError unless both are the same network."""
    if first != second:
        raise ValueError(
            f"{what} of different networks cannot be compared: '{first}' and '{second}'"
        )


class Features(NamedTuple):
    """What a network sees in a batch, on the CPU."""

    values: Tensor
    """[N, D] float32."""
    probabilities: Tensor | None
    """p(class | image) [N, C]; None where not asked for, or where the network knows no classes."""


class Extractor(Protocol):
    """Pictures in, features out."""

    @property
    def identity(self) -> Identity:
        """Which network."""

    @property
    def dim(self) -> int:
        """Number of features."""

    @property
    def classes(self) -> int | None:
        """Number of classes; None where it knows none."""

    def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
        """Features of uint8 [N, 3, H, W] of any size; with ``classify`` probabilities too."""


class Classifier(Protocol):
    """Pictures in, probabilities of classes out."""

    @property
    def identity(self) -> Identity:
        """Which network."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    def __call__(self, pictures: Tensor) -> Tensor:
        """p(class | image) [N, classes] of uint8 [N, 3, H, W]."""


class PairNetwork(Protocol):
    """Two batches of pictures in, perceptual distances out."""

    @property
    def identity(self) -> Identity:
        """Which network."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances [N] float64 of uint8 [N, 3, H, W] from uint8 [N, 3, H, W]."""


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No gradients, no autocast, no TF32: scores must not depend on settings meant for speed."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        _without_tf32(),
    ):
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """torch has two interfaces for it and refuses their mixture: use the one that is in use."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    switches = (matmul, cudnn)
    name: str = "allow_tf32"
    off: bool | str = False
    try:
        before: list[Any] = [switch.allow_tf32 for switch in switches]
    except RuntimeError:
        switches = (matmul, cudnn.conv)
        name, off = "fp32_precision", "ieee"
        before = [switch.fp32_precision for switch in switches]
    changed = [pair for pair in zip(switches, before, strict=True) if pair[1] != off]
    for switch, _ in changed:
        setattr(switch, name, off)
    try:
        yield
    finally:
        for switch, value in changed:
            setattr(switch, name, value)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unit_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """LPIPS of two networks' layers [N, C, H, W] without learned weights, summed over layers; [N].

    Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric":
    features of unit length at every position, squared difference summed over channels, averaged
    over positions.
    """
    total = torch.zeros(len(first[0]), dtype=torch.float64, device=first[0].device)
    for a, b in zip(first, second, strict=True):
        difference = (_unit(a) - _unit(b)).square().sum(1)
        total += difference.flatten(1).mean(1).to(torch.float64)
    return total.cpu()


def _unit(layer: Tensor) -> Tensor:
    return layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10)
