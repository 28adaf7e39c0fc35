"""GroupNorm followed by SiLU: in an ``nn.Sequential``, or side by side in a known owner."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palette.acceleration.exchange import Fused, Swap, exchange, same, stand_in, trial, watched
from palette.ops import group_norm_silu

# What autocast casts for, whatever dtype it is given.
PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_STATE = set(vars(nn.GroupNorm(1, 1)))
_SILU_STATE = set(vars(nn.SiLU()))


def normalise(
    norm: nn.Module,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """``palette.ops.group_norm_silu`` with the norm's parameters, in any mixture of dtypes."""
    assert isinstance(norm, nn.GroupNorm)

    def beside_x(value: Tensor | None) -> Tensor | None:
        if value is None or value.dtype in (x.dtype, torch.float32):
            return value
        return value.float()

    weight, bias, scale, shift = (
        beside_x(value) for value in (norm.weight, norm.bias, scale, shift)
    )
    return group_norm_silu(x, weight, bias, norm.num_groups, norm.eps, scale, shift, silu)


def is_group_norm(layer: object) -> bool:
    """Whether the layer is nn.GroupNorm, or a subclass of it that was tried and does the same.

    Guided-diffusion's GroupNorm32, which computes in float32 and gives back its input's dtype, is
    one; so is any other whose instances hold nothing but what GroupNorm's do.
    """
    if type(layer) is nn.GroupNorm:
        return True
    if not isinstance(layer, nn.GroupNorm) or isinstance(layer, Fused):
        return False
    if set(vars(layer)) != _NORM_STATE:
        return False
    shape, generator = (2, layer.num_channels, 3, 5), torch.Generator().manual_seed(0)
    try:
        twin: Any = stand_in(layer)
        with trial():
            x = torch.randn(shape, generator=generator, dtype=torch.float32)
            results = [twin(size * x) for size in (1.0, 0.003)]
            expected = [
                F.group_norm(size * x, layer.num_groups, twin.weight, twin.bias, layer.eps)
                for size in (1.0, 0.003)
            ]
            half = twin(x.bfloat16())
    except Exception:  # foreign code: whatever it raises, it is not known
        return False
    return half.dtype == torch.bfloat16 and all(map(same, results, expected))


def is_silu(layer: object) -> bool:
    """Whether the layer is nn.SiLU, or one without any state that was tried and does the same."""
    if type(layer) is nn.SiLU:
        return True
    if not isinstance(layer, nn.Module) or isinstance(layer, Fused) or layer._modules:
        return False
    if layer._parameters or layer._buffers or not set(vars(layer)) <= _SILU_STATE:
        return False
    try:
        with trial():
            x = torch.linspace(-8, 8, 65, dtype=torch.float32).reshape(1, 1, 5, 13)
            return same(layer.forward(x.clone()), F.silu(x))
    except Exception:  # foreign code: whatever it raises, it is not known
        return False


class FusedSequential(Fused):
    """nn.Sequential with each GroupNorm and the SiLU behind it as one op."""

    def fits(self, input: Tensor) -> bool:
        # On some devices GroupNorm under autocast gives float32, where the op keeps the input's
        # dtype. A projection that follows hides that; otherwise the caller would see it.
        if not torch.is_autocast_enabled(input.device.type):
            return True
        last = list(self._modules).index(list(self._palette_parts)[-1])
        behind = list(self._modules.values())[last + 1 :]
        return any(isinstance(layer, PROJECTIONS) for layer in behind)

    def fused(self, input: Tensor) -> Tensor:
        parts = self._palette_parts
        x = input
        for name, layer in self._modules.items():
            if name not in parts:
                x = layer(x)  # type: ignore[misc]
            elif isinstance(layer, nn.GroupNorm):
                x = normalise(layer, x)
        return x

    def stale(self) -> bool:
        return _pairs(self._modules) != self._palette_parts


def _pairs(layers: Mapping[str, Any]) -> dict[str, type[nn.Module]]:
    """Name and class of each GroupNorm with a SiLU behind it, and of that."""
    parts: dict[str, type[nn.Module]] = {}
    for (name, norm), (behind, activation) in itertools.pairwise(layers.items()):
        if isinstance(norm, nn.GroupNorm) and is_silu(activation) and is_group_norm(norm):
            parts |= {name: type(norm), behind: type(activation)}
    return parts


def match_sequential(module: nn.Module) -> Swap | str | None:
    """A swap for an nn.Sequential that holds GroupNorm and SiLU in turn."""
    if type(module) is not nn.Sequential:
        return None
    parts = _pairs(module._modules)
    if not parts:
        return None
    if "forward" in vars(module):
        return "its forward has been replaced"
    for name in parts:
        if watched(module._modules[name]):
            return f"{name} has a hook"
    pairs = len(parts) // 2
    return Swap(FusedSequential, "GroupNorm + SiLU" + f", {pairs} times" * (pairs > 1), parts)


class Pair:
    """A norm and an activation, by their names in the owner that calls them one after the other.

    The owner is referred to weakly, so that it is freed as soon as nobody else needs it.
    """

    def __init__(self, owner: nn.Module, layers: dict[str, nn.Module]) -> None:
        self._owner = weakref.ref(owner)
        self.layers = layers

    def intact(self) -> bool:
        """Whether the owner still has both layers, and both know of each other."""
        owner = self._owner()
        return owner is not None and all(
            owner._modules.get(name) is layer and isinstance(layer, _Paired)
            for name, layer in self.layers.items()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        owner = self._owner()
        return Pair, (nn.Module() if owner is None else owner, self.layers)  # gone, it stays gone


class _Paired(Fused):
    """One of two layers that their owner calls one after the other."""

    _palette_pair: Pair

    def fits(self, input: Tensor) -> bool:
        return not (self.stale() or any(map(watched, self._palette_pair.layers.values())))

    def stale(self) -> bool:
        return not self._palette_pair.intact()


class PairedNorm(_Paired):
    """GroupNorm that does the work of the SiLU behind it."""

    def fused(self, input: Tensor) -> Tensor:
        return normalise(self, input)


class PairedSiLU(_Paired):
    """SiLU that finds its work done."""

    def fused(self, input: Tensor) -> Tensor:
        return input


def exchange_pair(owner: nn.Module, norm: str, activation: str) -> str:
    """Let the owner's norm do the work of both layers, as long as they stay and have no hooks.

    Returns what the report says of it.
    """
    what = "GroupNorm + SiLU, which its owner calls in turn"
    pair = Pair(owner, {name: owner.get_submodule(name) for name in (norm, activation)})
    exchange(pair.layers[norm], Swap(PairedNorm, what, {}))
    exchange(pair.layers[activation], Swap(PairedSiLU, "done by the norm before it", {}))
    for layer in pair.layers.values():
        layer._palette_pair = pair  # type: ignore[assignment]
    return what
