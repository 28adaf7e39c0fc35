"""The built-in feature network: fixed random weights, the same everywhere, and needing nothing.

It makes every metric run where no trained network is at hand, and its scores do grow with damage to
a picture. They are no FID, PD or LPIPS: they are named ``..._random``, and compare with nothing but
other scores of this network.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from palette.metrics.networks import Features, Identity, exact, unit_distance, weights_digest
from palette.metrics.pictures import check_pictures
from palette.ops import philox

NAME = "random-conv-1 (built in, fixed random weights, NOT Inception; resize 128x128)"

_SIDE = 128
_LAYERS = ((3, 32, 5), (32, 64, 3), (64, 128, 3), (128, 256, 3))  # channels in, out, kernel
_SEED = 0x50414C45545445
_PLAIN = 8  # filters of the first layer that see brightness and colour; the others see texture


class RandomNetwork:
    """Four strided convolutions with ReLU; the features are each layer's mean over the picture.

    Weights are words of Philox4x32-10, centred and scaled (uniform, He et al. 2015): no function
    whose rounding differs between machines is involved. Most of the first layer's filters sum to 0
    and weigh double, or brightness would drown blur and noise. It computes in float64, one picture
    at a time on a CPU, and rounds once to float32, so that features do not depend on batches,
    threads or device but for the rarest last digit.
    """

    identity: Identity
    dim = sum(out for _, out, _ in _LAYERS)
    classes: int | None = None

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._weights = [weight.to(device) for weight in _weights()]
        self._device = torch.device(device)
        self.identity = _identity()

    def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
        """Features [N, 480] float32 of uint8 [N, 3, H, W]; it knows no classes."""
        check_pictures(pictures, "pictures")
        means = [
            torch.cat([layer.mean((2, 3)) for layer in self._layers(part)], dim=1)
            for part in self._parts(pictures)
        ]
        return Features(torch.cat(means).to("cpu", torch.float32), None)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Unweighted LPIPS [N] float64 on these layers, of uint8 [N, 3, H, W] each."""
        check_pictures(first, "first")
        check_pictures(second, "second")
        pairs = zip(self._parts(first), self._parts(second), strict=True)
        return torch.cat([unit_distance(self._layers(a), self._layers(b)) for a, b in pairs])

    def _parts(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return torch.split(pictures, 1 if self._device.type == "cpu" else len(pictures))

    def _layers(self, pictures: Tensor) -> list[Tensor]:
        with exact():
            hidden = pictures.to(self._device, torch.float64) / 127.5 - 1
            if hidden.shape[2:] != (_SIDE, _SIDE):
                hidden = F.interpolate(
                    hidden, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False
                )
            layers = []
            for weight in self._weights:
                hidden = F.relu(F.conv2d(hidden, weight, stride=2, padding=weight.shape[-1] // 2))
                layers.append(hidden)
            return layers


class RandomDistance:
    """:meth:`RandomNetwork.distance` as a network for pairs."""

    def __init__(self, network: RandomNetwork | None = None) -> None:
        self._network = network or RandomNetwork()
        self.identity = self._network.identity

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances [N] float64 of uint8 [N, 3, H, W] from uint8 [N, 3, H, W]."""
        return self._network.distance(first, second)


@functools.lru_cache(maxsize=1)
def _weights() -> tuple[Tensor, ...]:
    """float64 [out, in, k, k] of each layer, uniform with variance 2 / fan-in."""
    weights = []
    for number, (inputs, outputs, kernel) in enumerate(_LAYERS):
        fan_in = inputs * kernel * kernel
        words = philox.words(torch.tensor([_SEED]), outputs * fan_in, layer=number)
        centred = (words.to(torch.float64) + 0.5) * 2.0**-32 - 0.5
        scaled = centred * math.sqrt(12 * 2 / fan_in)
        weights.append(scaled.reshape(outputs, inputs, kernel, kernel))
    texture = weights[0][_PLAIN:]
    texture -= texture.mean((2, 3), keepdim=True)
    texture *= 2
    return tuple(weights)


@functools.lru_cache(maxsize=1)
def _identity() -> Identity:
    named = {f"layer{number}": weight for number, weight in enumerate(_weights())}
    return Identity(NAME, weights_digest(named), stand_in=True)
