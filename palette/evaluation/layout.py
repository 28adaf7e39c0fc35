"""What lies where in the folder of an evaluation, and whether a picture in it can be trusted.

``inputs/00000.png``, ``truth/00000.png``, ``masks/00000.png`` (where the task has one) and
``samples/00000_0.png``, ``samples/00000_1.png``, ... belong to the input whose original name stands
in ``names.json``. Every picture appears under its name whole, and carries a mark of the plan it was
made by, so that one of another plan, or a damaged one, is made again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from palette import _durable
from palette.files import write_png

EVALUATION = "evaluation.json"
NAMES = "names.json"
SCORES = "scores.json"
TABLE = "scores.txt"
REFERENCE = "reference"  # statistics of the reference, unless another folder is named for them

INPUTS, TRUTH, MASKS, SAMPLES = "inputs", "truth", "masks", "samples"


class Layout:
    """The folder of one evaluation.

    Args:
        root: the folder, made where missing.
        count: how many inputs there are; their numbers have at least five digits.
        mark: the plan's, kept in every picture.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, root: Path, count: int, mark: str) -> None:
        self.root, self.mark = root, mark
        self._digits = max(5, len(str(count - 1)))
        try:
            for folder in (INPUTS, TRUTH, SAMPLES):
                (root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{root}: cannot be made: {error.strerror}") from None

    def name(self, number: int) -> str:
        """An input's number as its files have it."""
        return f"{number:0{self._digits}d}"

    def picture(self, folder: str, number: int) -> Path:
        """The file of an input in ``inputs``, ``truth`` or ``masks``."""
        return self.root / folder / f"{self.name(number)}.png"

    def sample(self, number: int, copy: int) -> Path:
        """The file of a sample of an input."""
        return self.root / SAMPLES / f"{self.name(number)}_{copy}.png"

    def write(self, path: Path, image: PILImage.Image, record: dict[str, Any]) -> None:
        """Write a picture with what it is in its text chunk."""
        path.parent.mkdir(exist_ok=True)
        write_png(path, image, {**record, "evaluation": self.mark})

    def is_sound(self, path: Path) -> bool:
        """Whether a picture is there, undamaged, and of this plan."""
        try:
            with PILImage.open(path) as image:
                found = json.loads(image.info.get("palette", "{}"))
                image.verify()  # the checksums of all chunks
        except Exception:  # whatever a damaged file makes Pillow raise
            return False
        return isinstance(found, dict) and found.get("evaluation") == self.mark

    def sweep(self) -> None:
        """Remove what killed processes left half written."""
        for folder in (self.root, *(path for path in self.root.iterdir() if path.is_dir())):
            _durable.sweep(folder)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON, whole or not at all."""
    _durable.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
