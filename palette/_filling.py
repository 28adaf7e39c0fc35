"""Holes in pictures of any size: inpainting, uncropping, panoramas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from palette._engine import Engine, Options, Request
from palette._pictures import (
    Picture,
    extended,
    like,
    open_mask,
    open_picture,
    size_of,
    widened,
)
from palette.build import image_size, trained_tasks
from palette.data import images, region
from palette.data.canvas import Rectangle, beyond
from palette.data.order import sample_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Those with a method; what a user registers is done as "paired" is.
_TASKS = frozenset(
    ("inpaint", "uncrop", "colorize", "paired", "restore_jpeg", "upscale", "generate")
)


class Filling(Engine):
    """The methods of a pipeline that fill holes, and what all of its methods share."""

    def inpaint(
        self,
        image: Picture | list[Picture],
        mask: Picture | list[Picture],
        **options: Unpack[Options],
    ) -> Any:
        """Fill the white part of ``mask`` in ``image``; every other pixel keeps its value.

        By default the network sees the hole and as much around it, at the size it was trained for.

        Args:
            image: PIL image, path, uint8 array [H, W, 3] or tensor [3, H, W] in [-1, 1], or a list.
            mask: the same kinds, white (or 1) = to be filled, of the image's size, or a name such
                as "center" (``palette.data.masks``); one for all images or one for each.
            options: see :class:`Options`.

        Returns:
            What was given: an image for an image or path, an array for an array, a tensor for a
            tensor; a list for a list.

        Raises:
            ValueError: an image is unreadable, a mask has no hole or another size, or the model
                was not trained to fill holes.
        """
        self._require("inpaint", "uncrop")
        request = self._request(**options)
        given = image if isinstance(image, list) else [image]
        masks = mask if isinstance(mask, list) else [mask] * len(given)
        if len(masks) != len(given):
            raise ValueError(
                f"mask: {len(masks)} masks for {len(given)} images; give 1 or one each"
            )
        pictures = [open_picture(picture) for picture in given]
        holes = [
            open_mask(each, picture, request.seed + index)
            for index, (each, picture) in enumerate(zip(masks, pictures, strict=True))
        ]
        filled = self._fill(pictures, holes, request)
        results = [
            like(source, result, hole)
            for source, result, hole in zip(given, filled, holes, strict=True)
        ]
        return results if isinstance(image, list) else results[0]

    def uncrop(
        self,
        image: Picture | list[Picture],
        side: str | None = None,
        *,
        by: float | None = None,
        rectangle: Rectangle | None = None,
        mask: Picture | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Continue a picture beyond its border; every pixel of it keeps its value.

        Args:
            image: as of ``inpaint``.
            side: "left", "right", "top", "bottom" or "all" (the default), see ``by``.
            by: how far beyond, as share of the picture's side; by default half of the result is
                new, as in training.
            rectangle: in place of a side, what the result shows: (left, top, right, bottom) in
                pixels of the picture, whose own is (0, 0, W, H).
            mask: in place of both, a hole in the picture as of ``inpaint``; "one_direction",
                "rectangle" and "uncrop_published" are drawn as the published code draws them.
            options: see :class:`Options`.

        Returns:
            As of ``inpaint``; unless there is a mask, of another size.

        Raises:
            ValueError: the arguments do not go together; the rest as of ``inpaint``.
        """
        if sum(each is not None for each in (side, rectangle, mask)) > 1:
            raise ValueError("side, rectangle, mask: give one of them, not several")
        if by is not None and (rectangle is not None or mask is not None):
            raise ValueError("by: says how far beyond a side, not beyond a rectangle or a mask")
        if mask is not None:
            return self.inpaint(image, mask, **options)
        given = image if isinstance(image, list) else [image]
        plain = [
            each if isinstance(each, (Tensor, np.ndarray)) else open_picture(each) for each in given
        ]
        boxes = [rectangle or beyond(size_of(each), side or "all", by) for each in plain]
        both = [extended(each, box) for each, box in zip(plain, boxes, strict=True)]
        canvases = [canvas for canvas, _ in both]
        holes: list[Picture] = [hole for _, hole in both]
        results = self.inpaint(canvases, holes, **options)
        return results if isinstance(image, list) else results[0]

    def panorama(
        self, image: Picture | list[Picture], width: int, **options: Unpack[Options]
    ) -> Any:
        """Widen a picture to ``width`` pixels by uncropping again and again, on both sides in turn.

        Each time half of what the network sees is new (Saharia et al. 2022, figure 2: eight times
        each way from 256 to 2304 pixels). Arguments, result and errors as of ``inpaint``; a tensor
        comes back in 256 levels.
        """
        shape = image_size(self.config)

        def widen(picture: PILImage.Image, request: Request) -> PILImage.Image:
            if width <= picture.width:
                raise ValueError(f"width: found {width}; the picture has {picture.width} already")
            window = max(round(picture.height * shape[1] / shape[0]), 2)

            def paint(canvas: PILImage.Image, hole: region.Mask, index: int) -> PILImage.Image:
                turn = replace(request, seed=sample_seed(request.seed, 0, index))
                return self._fill([canvas], [hole], turn)[0]

            return widened(picture, width, window, paint)

        return self._each(("inpaint", "uncrop"), image, options, widen)

    def _fill(
        self, pictures: list[PILImage.Image], holes: list[region.Mask], request: Request
    ) -> list[PILImage.Image]:
        results = []
        for index, (picture, hole) in enumerate(zip(pictures, holes, strict=True)):
            part = region.around_hole(hole, image_size(self.config))
            if request.tiled:
                part = part.unscaled
            elif request.native:
                part = self._whole(picture, request)
            small, small_hole = region.shrink(picture, hole, part)
            sample = self._complete(
                images.to_tensor(small)[None].to(self.device),
                torch.from_numpy(small_hole)[None, None].float().to(self.device),
                torch.tensor([request.seed + index], device=self.device),
                request,
            )
            results.append(region.paste(picture, hole, part, images.to_image(sample[0].cpu())))
        return results

    def _each(
        self,
        task: str | tuple[str, ...],
        image: Picture | list[Picture],
        options: Options,
        make: Callable[[PILImage.Image, Request], PILImage.Image],
    ) -> Any:
        """``make`` of every picture, each with its own seed, as what was given."""
        self._require(*((task,) if isinstance(task, str) else task))
        request = self._request(**options)
        given = image if isinstance(image, list) else [image]
        pictures = [open_picture(picture) for picture in given]
        results = [
            like(source, make(picture, replace(request, seed=request.seed + index)))
            for index, (source, picture) in enumerate(zip(given, pictures, strict=True))
        ]
        return results if isinstance(image, list) else results[0]

    def _require(self, *tasks: str) -> None:
        """Refuse what the model was not trained for; any of ``tasks`` will do."""
        trained = trained_tasks(self.config)
        own = "paired" in tasks and not _TASKS.issuperset(trained)
        if not (set(tasks) & set(trained) or own):
            where = f"{self.name}: " if self.name else ""
            raise ValueError(
                f"{where}the model was trained to {' and '.join(trained)}, not to {tasks[0]}"
            )

    def _whole(self, picture: PILImage.Image, request: Request) -> region.Region:
        """All of the picture, at the network's size unless the request wants it at its own."""
        size = (picture.height, picture.width)
        own = request.native or request.tiled
        return region.whole(size, size if own else image_size(self.config))
