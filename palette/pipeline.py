"""A network, its schedule and its task behind methods that take images and give images.

``palette.load(path)`` opens what training wrote; ``Pipeline.inpaint`` fills the hole of a
picture of any size. Nothing here needs the ground truth.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from palette import checkpoint as checkpoints
from palette import config as configs
from palette import upstream
from palette._engine import Options as Options
from palette._engine import Request
from palette._filling import Filling
from palette._pictures import (
    Picture,
    recolour,
)
from palette.build import build_network, image_size, tells_level
from palette.config import Config
from palette.data import images
from palette.data.degrade import blur_with_noise, enlarge
from palette.data.tasks import grey
from palette.models.layers import pair

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Pipeline(Filling):
    """A trained model and the tasks it can do.

    Every method wants a model that was trained for its task, alone or in a mixture.
    """

    def colorize(self, image: Picture | list[Picture], **options: Unpack[Options]) -> Any:
        """Give grey pictures colours; colours that are there already are not looked at.

        A picture larger than the network's is coloured at the network's size. Of what the network
        paints only the colours are taken: the picture's own brightness stays, at its own size.
        Arguments, result and errors as of ``inpaint``.
        """

        def paint(picture: PILImage.Image, request: Request) -> PILImage.Image:
            part = self._whole(picture, request)
            painted = self._translate(grey(images.to_tensor(part.view(picture))), request)
            return recolour(picture, painted)

        return self._each("colorize", image, options, paint)

    def paired(self, image: Picture | list[Picture], **options: Unpack[Options]) -> Any:
        """Make the other picture of a pair, and whatever else a task of your own makes of one.

        A picture larger than the network's is translated at the network's size and enlarged
        again. Arguments, result and errors as of ``inpaint``.
        """

        def make(picture: PILImage.Image, request: Request) -> PILImage.Image:
            part = self._whole(picture, request)
            other = self._translate(images.to_tensor(part.view(picture)), request)
            return other.resize(picture.size, PILImage.Resampling.BICUBIC)

        return self._each("paired", image, options, make)

    def restore_jpeg(self, image: Picture | list[Picture], **options: Unpack[Options]) -> Any:
        """Undo JPEG compression, at the picture's own size.

        A picture larger than the network's is seen in tiles unless ``native``: the blocks of JPEG
        must not be resized. Arguments, result and errors as of ``inpaint``.
        """

        def restore(picture: PILImage.Image, request: Request) -> PILImage.Image:
            return self._translate(images.to_tensor(picture), _unscaled(request))

        return self._each("restore_jpeg", image, options, restore)

    def upscale(
        self,
        image: Picture | list[Picture],
        factor: float | None = None,
        *,
        augmentation: float | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Raise the resolution, at the size of the result: a large one is seen in tiles.

        Args:
            image: as of ``inpaint``.
            factor: side of the result over that of the picture, above 1; default
                ``config.task.factor``, for which the model was trained.
            augmentation: share of the variance of the enlarged picture that becomes noise, of
                which the network is told: what hides the faults of the stage before. At most
                ``config.task.augmentation``; default ``config.sample.augmentation``.
            options: see :class:`Options`; with ``native`` no tiles.

        Raises:
            ValueError: a number is out of range; the rest as of ``inpaint``.
        """
        times = self.config.task.factor if factor is None else factor
        share = self.config.sample.augmentation if augmentation is None else augmentation
        most = self.config.task.augmentation
        if not times > 1:
            raise ValueError(f"factor: found {factor}, wants a number above 1")
        if not 0 <= share <= most:
            raise ValueError(f"augmentation: found {share}; the model was trained with 0 to {most}")

        def raise_resolution(picture: PILImage.Image, request: Request) -> PILImage.Image:
            size = (round(picture.height * times), round(picture.width * times))
            known = enlarge(images.to_tensor(picture), size).to(self.device)
            if share > 0:
                seeds = torch.tensor([request.seed], device=self.device)
                known = blur_with_noise(known, self._condition_noise(seeds, known.shape)[0], share)
            return self._translate(known, _unscaled(request), level=1.0 - share)

        return self._each("upscale", image, options, raise_resolution)

    def generate(
        self,
        count: int | None = None,
        *,
        size: int | tuple[int, int] | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Make pictures from nothing but a seed, and a label where the model has classes.

        Args:
            count: how many; the i-th has ``seed + i``.
            size: n or (height, width); default that of training. Larger ones are made in tiles.
            options: see :class:`Options`, above all ``label`` and ``guidance``.

        Returns:
            A PIL image, or with ``count`` a list of them.

        Raises:
            ValueError: a number is out of range, or the model was not trained to generate.
        """
        self._require("generate")
        if count is not None and count < 1:
            raise ValueError(f"count: found {count}, wants at least 1")
        request = _unscaled(self._request(**options))
        number = 1 if count is None else count
        seeds = request.seed + torch.arange(number, device=self.device)
        shape = image_size(self.config) if size is None else pair(size, "size")
        drawn = self._draw(torch.empty(number, 0, *shape, device=self.device), seeds, request)
        pictures = [images.to_image(each.cpu()) for each in drawn]
        return pictures[0] if count is None else pictures

    def _translate(
        self, condition: Tensor, request: Request, *, level: float = 1.0
    ) -> PILImage.Image:
        """One picture drawn from one condition [C', H, W] of a noise level."""
        seeds = torch.tensor([request.seed], device=self.device)
        levels = torch.tensor([level], device=self.device) if tells_level(self.config) else None
        condition = condition[None].to(self.device)
        return images.to_image(self._draw(condition, seeds, request, level=levels)[0].cpu())


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
        weights: ``ema`` (averaged, what samples should come from), ``raw``, or the name of a
            further average that the checkpoint holds.
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
    if config is None:
        options = configs.from_yaml(found.config, origin=f"{path}, its config")
    else:
        options = _read(config)
    try:
        with torch.device("meta"):  # a small file may describe a network of any size
            build_network(options).load_state_dict(found.state, assign=True)
        network = build_network(options)
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


def _unscaled(request: Request) -> Request:
    """The picture's own size; in tiles, of which a small picture needs but one, unless native."""
    return request if request.native else replace(request, tiled=True)
