"""Feature networks in TorchScript files, given by path: the only place that loads such files.

A TorchScript file is a program. Loading it runs nothing, calling it runs whatever was compiled into
it: it can take all memory and time there is, and through torch's own operators read and write files
that you can. It cannot call Python. So a file is loaded only where its path was given explicitly,
never by searching, and ``sha256`` can demand exactly the file that somebody else has vouched for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from palette.metrics.networks import Features, Identity, exact
from palette.metrics.pictures import check_pictures

_CHUNK = 1 << 20
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]


class TorchScriptFeatures:
    """The Inception file of the StyleGAN papers (inception-2015-12-05.pt), or one with its ways.

    It is called with uint8 pictures of any size, which it resizes itself, as
    ``forward(pictures, return_features=True)`` for features [N, D], and with
    ``no_output_bias=True``, where it takes that, for probabilities [N, C]. Their vgg16.pt (features
    only; what precision and recall are usually measured with) works too.

    Args:
        path: of the file.
        device: where it computes.
        sha256: refuse any file but the one with this hash.

    Raises:
        ValueError: the file is missing, is no TorchScript, or no network of this kind.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        sha256: str | None = None,
    ) -> None:
        self._program = Program(path, device, sha256)
        if "return_features" not in self._program.arguments:
            raise ValueError(
                f"{self._program.path}: its forward({', '.join(self._program.arguments)}) has no "
                "argument 'return_features'; wanted is a file like inception-2015-12-05.pt"
            )
        self.identity = self._program.identity("resize by the file itself")
        probe = (torch.arange(2 * 3 * 64 * 64) * 37 % 251).reshape(2, 3, 64, 64).to(torch.uint8)
        values = self._program.rows(probe, return_features=True)
        self.dim: int = values.shape[1]
        self.classes: int | None = None
        self._head: Tensor | None = None
        if "no_output_bias" in self._program.arguments:
            wanted = self._program.rows(probe, no_output_bias=True)
            self.classes = wanted.shape[1]
            self._head = self._find_head(values, wanted)

    def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
        """Features of uint8 [N, 3, H, W], and probabilities where the file has them."""
        check_pictures(pictures, "pictures")
        values = self._program.rows(pictures, return_features=True)
        if not classify or self.classes is None:
            return Features(values, None)
        if self._head is not None:
            return Features(values, _probabilities(values, self._head))
        return Features(values, self._program.rows(pictures, no_output_bias=True))

    def _find_head(self, values: Tensor, wanted: Tensor) -> Tensor | None:
        """The last layer [classes, D], where it alone explains the probabilities of a probe.

        It saves the second run of the whole network that the file's interface would take.
        """
        head = self._program.weight("output")
        if head is None or list(head.shape) != [self.classes, self.dim]:
            return None
        agree = torch.allclose(_probabilities(values, head), wanted.double(), atol=1e-5, rtol=1e-3)
        return head if agree else None


class TorchScriptClassifier:
    """A classifier ``forward(images) -> logits [N, classes]`` for ImageNet-normalised images.

    Pictures are resized (short side 256, bilinear, antialiased), cropped to the central 224x224 and
    normalised with ImageNet's mean and deviation. Arguments and errors as of TorchScriptFeatures.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        sha256: str | None = None,
    ) -> None:
        self._program = Program(path, device, sha256)
        self.identity = self._program.identity("resize 256, centre 224")
        probe = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.classes: int = probe.shape[1]

    def __call__(self, pictures: Tensor) -> Tensor:
        """p(class | image) [N, classes] float64 of uint8 [N, 3, H, W]."""
        check_pictures(pictures, "pictures")
        logits = self._program.rows(imagenet_view(pictures.to(self._program.device)))
        return logits.to(torch.float64).softmax(1)


class TorchScriptLpips:
    """LPIPS from a file: vgg16.pt of the StyleGAN papers, or ``forward(first, second) -> [N]``.

    The first kind takes ``resize_images`` and ``return_lpips`` and returns embeddings [N, E] of
    images in 0..255 whose squared Euclidean distance is LPIPS. The second kind is given images in
    [-1, 1]. Arguments and errors as of TorchScriptFeatures.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        sha256: str | None = None,
    ) -> None:
        self._program = Program(path, device, sha256)
        arguments = self._program.arguments
        self._embeds = "return_lpips" in arguments
        if not self._embeds and len(arguments) != 2:
            raise ValueError(
                f"{self._program.path}: its forward({', '.join(arguments)}) neither takes "
                "'return_lpips', as vgg16.pt does, nor exactly two images"
            )
        self.identity = self._program.identity("no resize")
        probe = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        self(probe, probe)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances [N] float64 of uint8 [N, 3, H, W] from uint8 [N, 3, H, W]."""
        check_pictures(first, "first")
        check_pictures(second, "second")
        if self._embeds:
            a, b = (
                self._program.rows(part.to(torch.float32), resize_images=False, return_lpips=True)
                for part in (first, second)
            )
            return (a.to(torch.float64) - b.to(torch.float64)).square().sum(1)
        pair = [
            part.to(self._program.device, torch.float32) / 127.5 - 1 for part in (first, second)
        ]
        return self._program.call(*pair).reshape(len(first)).to("cpu", torch.float64)


class Program:
    """One TorchScript file and the checks around it."""

    def __init__(
        self, path: str | os.PathLike[str], device: str | torch.device, sha256: str | None
    ) -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self.digest = _digest(self.path)
        if sha256 is not None and self.digest != sha256.lower():
            raise ValueError(f"{self.path}: SHA-256 is {self.digest}, wanted is {sha256}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # these files are what there is
                load: Any = torch.jit.load
                self._module = load(self.path, map_location=self.device).eval()
            self.arguments = [a.name for a in self._module.forward.schema.arguments][1:]
        except Exception as error:  # whatever a file that is something else makes torch raise
            raise ValueError(
                f"{self.path}: not a TorchScript file (a program saved by torch.jit.save; "
                f"plain weights are not enough): {_first_line(error)}"
            ) from None

    def identity(self, how: str) -> Identity:
        """Name, hash and how pictures come in."""
        return Identity(f"{self.path.name} (TorchScript; {how})", self.digest)

    def call(self, *inputs: Tensor, **options: bool) -> Tensor:
        """Its output, a tensor. Raises ValueError for whatever goes wrong inside."""
        try:
            with exact(), _plain_execution():  # first and later calls alike
                output = self._module(*(tensor.to(self.device) for tensor in inputs), **options)
        except Exception as error:
            raise ValueError(f"{self.path}: failed when called: {_last_line(error)}") from error
        if not isinstance(output, Tensor):
            raise ValueError(f"{self.path}: returned {type(output).__name__}, wanted is a tensor")
        return output

    def weight(self, layer: str) -> Tensor | None:
        """The weight of one of its parts as float64 on the CPU, where there is one of that name."""
        found = getattr(getattr(self._module, layer, None), "weight", None)
        return found.detach().to("cpu", torch.float64) if isinstance(found, Tensor) else None

    def rows(self, pictures: Tensor, **options: bool) -> Tensor:
        """Its output [N, D] float32 on the CPU."""
        output = self.call(pictures, **options).to("cpu", torch.float32)
        if output.ndim != 2 or len(output) != len(pictures):
            raise ValueError(
                f"{self.path}: returned shape {list(output.shape)} for {len(pictures)} pictures, "
                f"wanted is [{len(pictures)}, D]"
            )
        return output


def imagenet_view(pictures: Tensor) -> Tensor:
    """Pictures uint8 [N, 3, H, W] as ImageNet's classifiers see them, float32 [N, 3, 224, 224]."""
    height, width = pictures.shape[2:]
    scale = 256 / min(height, width)
    size = (max(round(height * scale), 256), max(round(width * scale), 256))
    images = F.interpolate(
        pictures.to(torch.float32), size, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    crop = images[:, :, top : top + 224, left : left + 224] / 255
    mean, std = (torch.tensor(v, device=crop.device).view(3, 1, 1) for v in (_MEAN, _STD))
    return (crop - mean) / std


def _probabilities(values: Tensor, head: Tensor) -> Tensor:
    return (values.to(torch.float64) @ head.T).softmax(1)


def _plain_execution() -> contextlib.AbstractContextManager[None]:
    """No profiling, no fusion: the first and the later calls of a program compute the same."""
    guard: contextlib.AbstractContextManager[None] = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    return guard


def _digest(path: Path) -> str:
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; a TorchScript file is wanted") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()[:200]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
