"""A network, its schedule and its task behind methods that take images and give images.

``palette.load(path)`` opens what training wrote; ``Pipeline.inpaint`` fills the hole of a
picture of any size. Nothing here needs the ground truth.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from palette import checkpoint as checkpoints
from palette import config as configs
from palette import upstream
from palette.build import (
    build_levels,
    build_network,
    build_schedule,
    image_size,
    resolve_device,
    resolve_precision,
)
from palette.config import Config
from palette.data import images, masks, region
from palette.diffusion.sampler import Sampler
from palette.models.layers import channels_last
from palette.ops import noise

Picture: TypeAlias = "PILImage.Image | str | os.PathLike[str] | npt.NDArray[np.uint8] | Tensor"
Preview: TypeAlias = Callable[[int, Tensor], Any]

_CONDITION_STREAM = 1


@dataclass(frozen=True)
class Request:
    """How to sample: number of network evaluations, solver, first seed, and what to report."""

    steps: int
    solver: str
    seed: int
    eta: float = 0.0
    native: bool = False
    progress: bool = False
    on_step: Preview | None = None


class Pipeline:
    """A trained model and the tasks it can do.

    Attributes:
        network: the network, in evaluation mode.
        config: the options it was trained with.
        name: what it was loaded from, for the record in written pictures.
        digest: the first characters of the weights' SHA-256.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        name: str = "",
        digest: str = "",
    ) -> None:
        self.device = resolve_device(device) if isinstance(device, str) else device
        # "auto" is what it was trained in, which for published weights is float32.
        chosen = config.train.precision if precision == "auto" else precision
        self.dtype = resolve_precision(chosen, self.device)
        self.network = network.eval().to(device=self.device, dtype=self.dtype)
        channels_last(self.network)
        self.config, self.name, self.digest = config, name, digest
        self.schedule = build_schedule(config)
        self._samplers: dict[tuple[str, int, float], Sampler] = {}

    def inpaint(
        self,
        image: Picture | list[Picture],
        mask: Picture | list[Picture],
        *,
        steps: int | None = None,
        seed: int = 0,
        solver: str | None = None,
        eta: float | None = None,
        native: bool = False,
        progress: bool = False,
        on_step: Preview | None = None,
    ) -> Any:
        """Fill the white part of ``mask`` in ``image``; every other pixel keeps its value.

        Args:
            image: PIL image, path, uint8 array [H, W, 3] or tensor [3, H, W] in [-1, 1], or a list.
            mask: the same kinds, white (or 1) = to be filled, of the image's size; one for all
                images or one for each.
            steps: network evaluations; default ``config.sample.steps``.
            seed: image i of a list is drawn with ``seed + i``, alone or in a batch.
            solver: dpmpp_2m, unipc, ddim or ddpm; default ``config.sample.solver``.
            eta: noise of ddim.
            native: show the network the whole picture at its own size, not the region of the hole.
            progress: draw a bar on a terminal.
            on_step: called with the step and the current estimate [N, C, H, W] of the picture.

        Returns:
            What was given: an image for an image or path, an array for an array, a tensor for a
            tensor; a list for a list.

        Raises:
            ValueError: an image is unreadable, a mask has no hole or another size.
        """
        request = self._request(steps, solver, seed, eta, native, progress, on_step)
        given = image if isinstance(image, list) else [image]
        holes = mask if isinstance(mask, list) else [mask] * len(given)
        if len(holes) != len(given):
            raise ValueError(
                f"mask: {len(holes)} masks for {len(given)} images; give 1 or one each"
            )
        pictures = [_open(picture) for picture in given]
        opened = [_open_mask(h, p) for h, p in zip(holes, pictures, strict=True)]
        filled = self._fill(pictures, opened, request)
        results = [
            _like(source, result, hole)
            for source, result, hole in zip(given, filled, opened, strict=True)
        ]
        return results if isinstance(image, list) else results[0]

    def record(
        self, seed: int, *, steps: int | None = None, solver: str | None = None
    ) -> dict[str, Any]:
        """What a written picture should say of its origin, to be drawn again."""
        request = self._request(steps=steps, solver=solver, seed=seed)
        return {
            "model": self.name,
            "weights": self.digest,
            "seed": request.seed,
            "steps": request.steps,
            "solver": request.solver,
        }

    def sampler(
        self, steps: int | None = None, solver: str | None = None, eta: float | None = None
    ) -> Sampler:
        """The step engine behind the methods, for a batch of any task; arguments as ``inpaint``."""
        return self._sampler(self._request(steps, solver, eta=eta))

    def complete(self, known: Tensor, mask: Tensor, seeds: Tensor, **options: Any) -> Tensor:
        """Fill the hole of a batch at the network's size.

        Args:
            known: [N, C, H, W] in [-1, 1]; what lies in the hole is never read.
            mask: [N, 1, H, W], 1 = hole.
            seeds: int64 [N], one per image.
            options: as for ``inpaint``: steps, solver, eta, progress, on_step.

        Returns:
            [N, C, H, W] float32 in [-1, 1], equal to ``known`` outside the hole.
        """
        request = self._request(**{"seed": 0, **options})
        known, mask, seeds = (tensor.to(self.device) for tensor in (known, mask, seeds))
        known = torch.where(mask.bool(), 0.0, known)
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        fill = noise(seeds, step, known.shape[1:], stream=_CONDITION_STREAM)
        sampler = self._sampler(request)
        return sampler.sample(
            known + mask * fill,
            seeds=seeds,
            channels=known.shape[1],
            known=known,
            mask=mask.to(known.dtype),
            progress=request.progress,
            on_step=request.on_step,
        )

    def _fill(
        self, pictures: list[PILImage.Image], holes: list[region.Mask], request: Request
    ) -> list[PILImage.Image]:
        results = []
        for index, (picture, hole) in enumerate(zip(pictures, holes, strict=True)):
            size = (picture.height, picture.width) if request.native else image_size(self.config)
            part = region.around_hole(hole, size)
            if request.native:
                part = region.Region(0, 0, picture.width, picture.height, *size)
            small, small_hole = region.shrink(picture, hole, part)
            sample = self.complete(
                images.to_tensor(small)[None],
                torch.from_numpy(small_hole)[None, None].float(),
                torch.tensor([request.seed + index]),
                **_options(request),
            )
            results.append(region.paste(picture, hole, part, images.to_image(sample[0].cpu())))
        return results

    def _sampler(self, request: Request) -> Sampler:
        key = (request.solver, request.steps, request.eta)
        if key not in self._samplers:
            self._samplers[key] = Sampler(
                self.network,
                build_levels(self.config, request.steps),
                solver=request.solver,
                prediction=self.config.model.prediction,
                eta=request.eta,
                dtype=self.dtype,
            )
        return self._samplers[key]

    def _request(
        self,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        eta: float | None = None,
        native: bool = False,
        progress: bool = False,
        on_step: Preview | None = None,
    ) -> Request:
        sample = self.config.sample
        steps = sample.steps if steps is None else steps
        # Few steps of a network published with a thousand ancestral ones want another solver.
        usual = (
            "dpmpp_2m" if sample.grid == "published" and steps != sample.steps else sample.solver
        )
        return Request(
            steps=steps,
            solver=solver or usual,
            seed=seed,
            eta=sample.eta if eta is None else eta,
            native=native,
            progress=progress,
            on_step=on_step,
        )


def load(
    path: str | os.PathLike[str],
    config: str | os.PathLike[str] | Config | None = None,
    *,
    weights: str = "ema",
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Pipeline:
    """Open a model: a run directory (its newest sound checkpoint), a checkpoint or one file.

    Args:
        path: what training or ``palette convert`` wrote, or a published ``.pth`` checkpoint (its
            path with or without ``_Network.pth``).
        config: a config, ours or a published JSON one, in place of the one saved with the weights;
            a published checkpoint needs it.
        weights: ``ema`` (averaged, what samples should come from) or ``raw``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ….
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        CheckpointError: nothing sound is found at ``path``.
        ConfigError: the config is wrong.
    """
    path = upstream.find_published(path, weights)
    if upstream.is_published(path):
        return _load_published(path, config, device, precision)
    found = checkpoints.open_model(Path(path), weights=weights)
    options = configs.from_yaml(found.config) if config is None else _read(config)
    network = build_network(options)
    try:
        network.load_state_dict(found.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise checkpoints.CheckpointError(f"{path}: does not fit its config: {reason}") from None
    return Pipeline(
        network, options, device=device, precision=precision, name=str(path), digest=found.digest
    )


def _load_published(
    path: str | os.PathLike[str],
    config: str | os.PathLike[str] | Config | None,
    device: str | torch.device,
    precision: str,
) -> Pipeline:
    if config is None:
        raise ValueError(f"{path}: config: a published checkpoint needs the JSON config beside it")
    options = _read(config)
    found = upstream.open_published(path, options)
    options = upstream.as_published(options, found)
    network = build_network(options)
    network.load_state_dict(found.weights)
    digest = checkpoints.file_digest(Path(path))
    return Pipeline(
        network, options, device=device, precision=precision, name=str(path), digest=digest
    )


def _read(config: str | os.PathLike[str] | Config) -> Config:
    return config if isinstance(config, Config) else upstream.read_config(config, "test")


def _options(request: Request) -> dict[str, Any]:
    names = ("steps", "solver", "eta", "progress", "on_step")
    return {name: getattr(request, name) for name in names}


def _open(picture: Picture) -> PILImage.Image:
    if isinstance(picture, Tensor):
        return images.to_image(picture)
    if isinstance(picture, np.ndarray):
        return PILImage.fromarray(picture).convert("RGB")
    if isinstance(picture, PILImage.Image):
        return picture.convert("RGB")
    return images.read(picture).convert("RGB")


def _open_mask(mask: Picture, picture: PILImage.Image) -> region.Mask:
    size = (picture.height, picture.width)
    if isinstance(mask, (str, os.PathLike)):
        hole = masks.load_mask(mask)
    elif isinstance(mask, Tensor):
        hole = (mask.reshape(mask.shape[-2:]).cpu().numpy() > 0.5).astype(np.uint8)
    elif isinstance(mask, np.ndarray):
        hole = (mask > (0.5 if mask.max(initial=0) <= 1 else 127)).astype(np.uint8)
    else:
        hole = (np.asarray(mask.convert("L")) > 127).astype(np.uint8)
    if hole.shape != size:
        raise ValueError(
            f"mask: its size {hole.shape[1]}x{hole.shape[0]} is not the image's {size[1]}x{size[0]}"
        )
    return hole


def _like(
    source: Picture, result: PILImage.Image, hole: region.Mask
) -> PILImage.Image | npt.NDArray[np.uint8] | Tensor:
    """The result as what was given; known values of a tensor are not rounded to 8 bits."""
    if isinstance(source, Tensor):
        filled = images.to_tensor(result, source.shape[0]).to(source)
        return torch.where(torch.from_numpy(hole).to(source.device).bool(), filled, source)
    if isinstance(source, np.ndarray):
        return cast(npt.NDArray[np.uint8], np.asarray(result))
    return result
