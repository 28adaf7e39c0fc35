"""Feature networks by what a command line says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from palette.checkpoint import load_safetensors, load_torch
from palette.metrics.libraries import (
    FidelityFeatures,
    LpipsPackage,
    TorchvisionClassifier,
    TorchvisionFeatures,
)
from palette.metrics.networks import Classifier, Extractor, PairNetwork
from palette.metrics.random_network import RandomDistance, RandomNetwork
from palette.metrics.scorer import Networks
from palette.metrics.torchscript import (
    TorchScriptClassifier,
    TorchScriptFeatures,
    TorchScriptLpips,
)

RANDOM = "random"
_LPIPS = ("alex", "vgg", "squeeze")


def open_networks(
    inception: str | None = None,
    network: str = RANDOM,
    lpips: str = RANDOM,
    classifier: str | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Networks:
    """The networks of an evaluation; nothing is downloaded.

    Args:
        inception: TorchScript file like the StyleGAN papers' inception-2015-12-05.pt, for FID, KID,
            IS, PD, precision and recall, in place of ``network``.
        network: ``random`` (built in), ``torch-fidelity`` or ``torchvision:NAME``.
        lpips: ``random``, ``alex``, ``vgg`` or ``squeeze`` of the lpips package, or the path of a
            TorchScript file.
        classifier: ``torchvision:NAME`` or the path of a TorchScript file; without one no CA.
        device: where they compute.

    ``=FILE`` after the name of a library's network says where its weights lie; they are looked for
    in torch's cache folder otherwise.

    Raises:
        ValueError: a name is unknown, a file is missing or something else, a library does not work.
    """
    if inception is not None and network != RANDOM:
        raise ValueError(f"--inception {inception} and --network {network}: one of them is wanted")
    return Networks(
        _extractor(network, device)
        if inception is None
        else TorchScriptFeatures(inception, device=device),
        _perceptual(lpips, device),
        None if classifier is None else _classifier(classifier, device),
    )


def _extractor(text: str, device: torch.device | str) -> Extractor:
    name, state = _split(text)
    if name == RANDOM:
        return RandomNetwork(device)
    if name == "torch-fidelity":
        return FidelityFeatures(state=state, device=device)
    if name.startswith("torchvision:"):
        return TorchvisionFeatures(name.partition(":")[2], state=state, device=device)
    raise ValueError(
        f"--network {text}: wanted is {RANDOM}, torch-fidelity or torchvision:NAME, each with "
        "=FILE where its weights lie in a file (a TorchScript file goes with --inception)"
    )


def _perceptual(text: str, device: torch.device | str) -> PairNetwork:
    name, state = _split(text)
    if name == RANDOM:
        return RandomDistance(RandomNetwork(device))
    if name in _LPIPS:
        return LpipsPackage(name, state=state, device=device)
    if Path(text).suffix == ".pt":
        return TorchScriptLpips(text, device=device)
    raise ValueError(
        f"--lpips {text}: wanted is {RANDOM}, {', '.join(_LPIPS)} or a TorchScript file (.pt)"
    )


def _classifier(text: str, device: torch.device | str) -> Classifier:
    name, state = _split(text)
    if name.startswith("torchvision:"):
        return TorchvisionClassifier(name.partition(":")[2], state=state, device=device)
    if Path(text).suffix == ".pt":
        return TorchScriptClassifier(text, device=device)
    raise ValueError(f"--classifier {text}: wanted is torchvision:NAME or a TorchScript file (.pt)")


def _split(text: str) -> tuple[str, Mapping[str, Tensor] | None]:
    """Name of a network and the weights in the file behind ``=``."""
    name, separator, file = text.partition("=")
    if not separator:
        return name, None
    weights = load_safetensors(file)[0] if file.endswith(".safetensors") else load_torch(file)
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{file}: not a state dict, names of weights with a tensor each")
    return name, weights
