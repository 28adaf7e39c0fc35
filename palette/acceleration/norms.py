"""GroupNorm followed by SiLU: in an ``nn.Sequential``, or side by side in a known owner."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palette.acceleration.exchange import Fused, Swap, exchange, same, stand_in, watched
from palette.ops import group_norm_silu

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
    x = torch.randn(2, layer.num_channels, 3, 5, generator=torch.Generator().manual_seed(0))
    try:
        twin: Any = stand_in(layer)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
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
    x = torch.linspace(-8, 8, 65).reshape(1, 1, 5, 13)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return same(layer.forward(x.clone()), F.silu(x))
    except Exception:  # foreign code: whatever it raises, it is not known
        return False


class FusedSequential(Fused):
    """nn.Sequential with each GroupNorm and the SiLU behind it as one op."""

    def fits(self, input: Tensor) -> bool:
        # On some devices GroupNorm under autocast gives float32, where the op keeps the input's
        # dtype. A layer that follows hides that; the caller would see it.
        ends = list(self._modules)[-1] in self._palette_parts
        return not (ends and torch.is_autocast_enabled(input.device.type))

    def fused(self, input: Tensor) -> Tensor:
        parts = self._palette_parts
        x = input
        for name, layer in self._modules.items():
            if name not in parts:
                x = layer(x)  # type: ignore[misc]
            elif isinstance(layer, nn.GroupNorm):
                x = normalise(layer, x)
        return x


def match_sequential(module: nn.Module) -> Swap | str | None:
    """A swap for an nn.Sequential that holds GroupNorm and SiLU in turn."""
    if type(module) is not nn.Sequential:
        return None
    layers = list(module._modules.items())
    parts: dict[str, type[nn.Module]] = {}
    for (name, norm), (behind, activation) in itertools.pairwise(layers):
        if isinstance(norm, nn.GroupNorm) and is_silu(activation) and is_group_norm(norm):
            parts |= {name: type(norm), behind: type(activation)}
    if not parts:
        return None
    if "forward" in vars(module):
        return "its forward has been replaced"
    for name in parts:
        if watched(module._modules[name]):
            return f"{name} has a hook"
    pairs = len(parts) // 2
    return Swap(FusedSequential, "GroupNorm + SiLU" + f", {pairs} times" * (pairs > 1), parts)


class _Paired(Fused):
    """One of two layers that their owner calls one after the other."""

    _palette_partner: tuple[nn.Module]  # in a tuple, so that it becomes no child

    def fits(self, input: Tensor) -> bool:
        (partner,) = self._palette_partner
        return isinstance(partner, _Paired) and not (watched(self) or watched(partner))


class PairedNorm(_Paired):
    """GroupNorm that does the work of the SiLU behind it."""

    def fused(self, input: Tensor) -> Tensor:
        return normalise(self, input)


class PairedSiLU(_Paired):
    """SiLU that finds its work done."""

    def fused(self, input: Tensor) -> Tensor:
        return input


def exchange_pair(norm: nn.Module, activation: nn.Module) -> str:
    """Let the norm do the work of both layers, as long as neither of them has a hook.

    Returns what the report says of it.
    """
    what = "GroupNorm + SiLU, which its owner calls in turn"
    exchange(norm, Swap(PairedNorm, what, {}))
    exchange(activation, Swap(PairedSiLU, "done by the norm before it", {}))
    norm._palette_partner = (activation,)  # type: ignore[assignment]
    activation._palette_partner = (norm,)  # type: ignore[assignment]
    return what
