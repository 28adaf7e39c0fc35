"""Weights fitted to a network with other channels at its ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LABELS = "label_emb.weight"
# First and last convolution of the guided-diffusion and of the SR3 U-Net.
_ENDS = (("input_blocks.0.0.weight", "out.2"), ("downs.0.weight", "final_conv.block.3"))


def adapt(weights: dict[str, Any], expected: Mapping[str, Tensor], *, guided: bool) -> list[str]:
    """Fit the first and the last convolution to a network, in place.

    Args:
        weights: under our names. What cannot be fitted stays as it is.
        expected: the ``state_dict()`` of the network (tensors on the meta device will do).
        guided: they are guided-diffusion's, whose outputs may end with learned variances, whose
            first convolution has the noisy picture before the condition (``SuperResModel``), and
            whose labels have no row for "no label".

    The channels of the condition and those of the noisy picture are fitted each for themselves:
    surplus ones at the end are cut off, missing ones are zeros there.

    Returns:
        One line for each tensor that was changed.
    """
    changes = []
    for first, last in _ENDS:
        made, wanted = (_channels(state, f"{last}.weight") for state in (weights, expected))
        if not (made and wanted):  # another network
            continue
        learned = made // 2 if guided and made % 2 == 0 and made != wanted else 0
        made -= learned
        for name in (f"{last}.weight", f"{last}.bias"):
            if _differing(weights, expected, name) == [0]:
                weights[name] = _fitted(weights[name][:made], wanted, dim=0)
                said = [f"{learned} channels of learned variance left out"] if learned else []
                said += _said(made, wanted, "the picture")
                changes.append(f"{name}: {', '.join(said)}")
        changes += _adapt_first(weights, expected, first, (made, wanted), guided)
    if guided and _differing(weights, expected, LABELS) == [0]:
        size = expected[LABELS].shape[0]
        if weights[LABELS].shape[0] == size - 1:
            weights[LABELS] = _fitted(weights[LABELS], size, dim=0)
            changes.append(f"{LABELS}: a row of zeros for no label")
    return changes


def _adapt_first(
    weights: dict[str, Any],
    expected: Mapping[str, Tensor],
    name: str,
    noisy: tuple[int, int],
    guided: bool,
) -> list[str]:
    """Fit the first convolution; ``noisy`` counts the channels of the noisy picture, before and
    after, which are as many as come out at the end."""
    if _differing(weights, expected, name) not in ([], [1]):
        return []
    value = weights[name]
    known = value.shape[1] - noisy[0], expected[name].shape[1] - noisy[1]
    if min(known) < 0:
        return []
    if guided:
        picture, condition = value.split([noisy[0], known[0]], dim=1)
    else:
        condition, picture = value.split([known[0], noisy[0]], dim=1)
    said = ["the condition moved before the noisy picture"] if guided and known[0] else []
    said += _said(*known, "the condition") + _said(*noisy, "the noisy picture")
    if not said:
        return []
    parts = _fitted(condition, known[1], dim=1), _fitted(picture, noisy[1], dim=1)
    weights[name] = torch.cat(parts, dim=1)
    return [f"{name}: {', '.join(said)}"]


def _fitted(value: Tensor, size: int, *, dim: int) -> Tensor:
    """Cut to a size, or with zeros behind."""
    value = value.narrow(dim, 0, min(size, value.shape[dim]))
    shape = [*value.shape]
    shape[dim] = size - shape[dim]
    return torch.cat([value, value.new_zeros(shape)], dim=dim)


def _said(found: int, wanted: int, what: str) -> list[str]:
    number = abs(wanted - found)
    channels = "1 channel" if number == 1 else f"{number} channels"
    if found < wanted:
        return [f"{channels} of zeros for {what}"]
    return [f"{channels} of {what} left out"] if found > wanted else []


def _channels(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    return value.shape[0] if isinstance(value, Tensor) and value.ndim > 0 else 0


def _differing(
    weights: Mapping[str, Any], expected: Mapping[str, Tensor], name: str
) -> list[int] | None:
    """The dimensions in which a tensor differs from the expected one; None: not comparable."""
    value, wanted = weights.get(name), expected.get(name)
    if not isinstance(value, Tensor) or wanted is None or value.ndim != wanted.ndim:
        return None
    return [dim for dim in range(value.ndim) if value.shape[dim] != wanted.shape[dim]]
