"""The sample photographs: real pictures that are already installed, split into two parts."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Literal

from PIL import Image

from palette.data import images
from palette.data.order import Draws

Split = Literal["train", "validation"]


class Photos:
    """Random crops of nine colour photographs that ship inside scikit-image; nothing is downloaded.

    Each picture is cut in two: validation crops come from a strip (:data:`PHOTOGRAPHS`) that no
    training crop touches. The crop's side is drawn log-uniformly from the wanted size up to all of
    the region; index modulo 9 chooses the picture. Pictures are decoded once, halved repeatedly,
    and a crop is taken from the smallest level that has 1.5 times its pixels.
    """

    # File, and the side on which the validation strip lies. The two motorcycles are a stereo pair:
    # what one view shows the other shows in the same rows, so only rows may be held out.
    PHOTOGRAPHS = (
        ("astronaut.png", "right"),
        ("chelsea.png", "right"),
        ("coffee.png", "left"),
        ("rocket.jpg", "right"),
        ("retina.jpg", "right"),
        ("hubble_deep_field.jpg", "right"),
        ("ihc.png", "bottom"),
        ("motorcycle_left.png", "top"),
        ("motorcycle_right.png", "top"),
    )
    VALIDATION_PART = 0.3  # of the picture's width or height

    def __init__(
        self,
        split: Split = "train",
        *,
        image_size: tuple[int, int],
        samples: int = 4096,
    ) -> None:
        if split not in ("train", "validation"):
            raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self._split: Split = split
        self._size = image_size
        self._samples = samples
        self._levels: dict[int, list[Image.Image]] = {}

    def __len__(self) -> int:
        return self._samples

    def load(self, index: int, draws: Draws) -> Image.Image:
        levels = self._pyramid(index % len(self.PHOTOGRAPHS))
        full, size = levels[0], self._size
        room = min(full.height / size[0], full.width / size[1])
        zoom = max(room, 1.0) ** draws.real()
        box = images.crop_box(
            (full.height, full.width), size, x=draws.real(), y=draws.real(), zoom=zoom
        )
        reduction = (box[2] - box[0]) / size[1]
        level = min(max(math.floor(math.log2(reduction / 1.5)), 0), len(levels) - 1)
        scaled = (box[0] / 2**level, box[1] / 2**level, box[2] / 2**level, box[3] / 2**level)
        return levels[level].resize((size[1], size[0]), Image.Resampling.LANCZOS, box=scaled)

    def name(self, index: int) -> str:
        file = self.PHOTOGRAPHS[index % len(self.PHOTOGRAPHS)][0]
        return f"{Path(file).stem}-{index:06d}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_levels": {}}  # decoded pictures need not travel to workers

    def _pyramid(self, number: int) -> list[Image.Image]:
        if number not in self._levels:
            file, side = self.PHOTOGRAPHS[number]
            picture = images.read(photograph(file)).convert("RGB")
            levels = [picture.crop(_region(picture.size, side, self._split, self.VALIDATION_PART))]
            while min(levels[-1].size) >= 32:
                levels.append(levels[-1].reduce(2))
            self._levels[number] = levels
        return self._levels[number]


def photograph(file: str) -> Path:
    """One of scikit-image's own pictures. Raises ValueError when the installation lacks it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("source 'photos' needs scikit-image: pip install scikit-image")
    path = Path(spec.origin).parent / "data" / file
    if not path.is_file():
        raise ValueError(f"{path}: missing; reinstall scikit-image from its wheel")
    return path


def _region(
    size: tuple[int, int], side: str, split: Split, part: float
) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of the strip on one side, or of all the rest."""
    width, height = size
    strip = round((width if side in ("left", "right") else height) * part)
    if split == "train":
        return {
            "left": (strip, 0, width, height),
            "right": (0, 0, width - strip, height),
            "top": (0, strip, width, height),
            "bottom": (0, 0, width, height - strip),
        }[side]
    return {
        "left": (0, 0, strip, height),
        "right": (width - strip, 0, width, height),
        "top": (0, 0, width, strip),
        "bottom": (0, height - strip, width, height),
    }[side]
