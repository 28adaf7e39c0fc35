"""Step caching: deep features of one evaluation used again in those after it.

Ma, Fang and Wang 2023, "DeepCache: Accelerating Diffusion Models for Free" (arXiv:2312.00858):
between neighbouring noise levels a U-Net's features change the less the deeper they lie.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Reuse:
    """A network whose ``body`` is whole at every ``interval``-th call of a walk along the levels.

    The first call is. Those between compute the outermost level alone, at full resolution, with
    the deep features of the last whole call in place of the rest.

    Args:
        network: with ``whole(x, embedding)``, which returns the answer and deep features of any
            kind, and ``shallow(x, embedding, deep)``, as ``unet.UNet`` has them.
        interval: 1 or more.
    """

    def __init__(self, network: Any, interval: int) -> None:
        self._network = network
        self._interval = interval
        self.start()

    def start(self) -> None:
        """Begin a walk: the next call is whole."""
        self._calls = 0
        self._deep: Any = None

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Predict from x [N, C, H, W] and embedding [N, E]."""
        output: Tensor
        if self._calls % self._interval == 0:
            output, self._deep = self._network.whole(x, embedding)
        else:
            output = self._network.shallow(x, embedding, self._deep)
        self._calls += 1
        return output


def reusable(network: object) -> bool:
    """Whether ``network``, and the one that it wraps as ``tiled.Tiled`` does, has deep features."""
    inner = getattr(network, "network", None)
    return hasattr(network, "shallow") and (inner is None or reusable(inner))
