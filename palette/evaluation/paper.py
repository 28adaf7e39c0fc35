"""The figures of the Palette paper, as data (Saharia et al. 2022, SIGGRAPH version, appendix C).

Table numbers and values are those of two independent transcriptions. FID and fool rates of T1, FID
of T2 to T5 and T7, LPIPS of T6 and the FID of 3.4 in T8 stand in both; the others, and all of T9 to
T11, in one of them only (the other one swaps the first two rows of T5). FID is against the whole
validation set (50,000 images of ImageNet, 36,500 of Places2), PD is the distance in the pool_3
layer of InceptionV1, CA [%] is of ResNet-50 by the text and of EfficientNet-B0 by appendix C.5, the
fool rate is in percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

METRICS = {
    "fid": "FID",
    "is": "IS",
    "ca": "CA [%]",
    "pd": "PD",
    "lpips": "LPIPS",
    "fool": "fool rate [%]",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table."""

    method: str
    values: Mapping[str, float]
    """Of :data:`METRICS`, those that the paper gives."""

    def columns(self) -> dict[str, float]:
        """The figures under the names that people use."""
        return {METRICS[key]: value for key, value in self.values.items()}


@dataclasses.dataclass(frozen=True)
class Table:
    """What the paper measured in one setting."""

    key: str
    number: str
    """As in the paper: "T1" is table 1."""
    task: str
    """Our name of the task."""
    data: str
    images: int
    """0 where the paper does not say."""
    setting: str
    """What was filled in, or how far a picture was compressed; the ablation."""
    rows: tuple[Row, ...]
    """Palette's own stand last, then the original images."""
    note: str = ""

    @property
    def title(self) -> str:
        """Which table this is, of what."""
        return f"Table {self.number[1:]}: {self.task}, {self.setting}; {self.data}"

    @property
    def palette(self) -> Row:
        """Palette's own row."""
        return next(row for row in reversed(self.rows) if row.method.startswith("Palette"))


def _row(method: str, fid: float | None = None, *rest: float) -> Row:
    """FID, IS, CA and PD in the order of most tables."""
    names = ("fid", "is", "ca", "pd", "fool")
    values = dict(zip(names[1:], rest, strict=False))
    return Row(method, values if fid is None else {"fid": fid, **values})


def _two(method: str, fid: float, pd: float) -> Row:
    return Row(method, {"fid": fid, "pd": pd})


def _ablation(method: str, fid: float, score: float, pd: float) -> Row:
    return Row(method, {"fid": fid, "is": score, "pd": pd})


def _loss(method: str, fid: float, pd: float, lpips: float) -> Row:
    return Row(method, {"fid": fid, "pd": pd, "lpips": lpips})


CTEST10K, PLACES10K, FIRST5K = "ImageNet ctest10k", "Places2 places10k", "ImageNet val, first 5000"

_ORIGINAL = _row("original images", 2.7, 250.1, 76.0, 0.0)
_ORIGINAL_HOLE = _row("original images", 5.1, 231.6, 74.6, 0.0)
_ORIGINAL_PLACES = _two("original images", 11.4, 0.0)
GLOBAL = "Palette: global attention, 552M parameters"
LOCAL = "local attention, 552M parameters"
BLOCKS = "more residual blocks, 603M parameters"
DILATED = "dilated convolution, 624M parameters"
BOTH = "Palette (trained on ImageNet and Places2)"
ONE = "Palette (trained on ImageNet)"

_COLORIZE = (
    Table(
        "colorize",
        "T1",
        "colorize",
        FIRST5K,
        5000,
        "grey to colour",
        (
            _row("pix2pix", 24.41),
            Row("PixColor", {"fid": 24.32, "fool": 29.90}),
            Row("ColTran", {"fid": 19.37, "fool": 36.55}),
            _row("Regression", 17.89, 169.8, 68.2, 60.0, 39.45),
            _row("Palette", 15.78, 200.8, 72.5, 46.2, 47.80),
            _row("original images", 14.68, 229.6, 75.6, 0.0),
        ),
    ),
    Table(
        "colorize-10k",
        "T8",
        "colorize",
        CTEST10K,
        10_000,
        "grey to colour",
        (
            _row("Palette (L1)", 3.4, 215.8, 71.9, 45.8),
            _row("Palette (L2)", 3.4, 212.9, 72.0, 48.0),
            _ORIGINAL,
        ),
    ),
)

_HOLES = {
    "10-20": (
        _row("DeepFillv2", 6.7, 198.2, 71.6, 38.6),
        _row("HiFill", 7.5, 192.0, 70.1, 46.9),
        _row(ONE, 5.1, 221.0, 73.8, 15.6),
        _row(BOTH, 5.2, 219.2, 73.7, 15.5),
    ),
    "20-30": (
        _row("DeepFillv2", 9.4, 174.6, 68.8, 64.7),
        _row("HiFill", 12.4, 157.0, 65.7, 86.2),
        _row(ONE, 5.2, 208.6, 72.6, 27.4),
        _row(BOTH, 5.2, 205.5, 72.3, 27.6),
    ),
    "30-40": (
        _row("DeepFillv2", 14.2, 144.7, 64.9, 95.5),
        _row("HiFill", 20.9, 115.6, 59.4, 131.0),
        _row(ONE, 5.5, 195.2, 71.4, 39.9),
        _row(BOTH, 5.6, 192.8, 71.3, 40.2),
    ),
    "center": (
        _row("DeepFillv2", 18.0, 135.3, 64.3, 117.2),
        _row("HiFill", 20.1, 126.8, 62.3, 129.7),
        _row(ONE, 6.4, 173.3, 69.7, 58.8),
        _row(BOTH, 6.6, 173.9, 69.3, 59.5),
    ),
}

_PLACES_HOLES = {
    "10-20": (
        _two("DeepFillv2", 12.2, 38.1),
        _two("HiFill", 13.0, 55.1),
        _two(ONE, 11.6, 22.1),
        _two(BOTH, 11.6, 20.3),
    ),
    "20-30": (
        _two("DeepFillv2", 13.5, 63.0),
        _two("HiFill", 15.7, 92.8),
        _two("Co-ModGAN", 12.4, 51.6),
        _two(ONE, 11.8, 37.7),
        _two(BOTH, 11.7, 35.0),
    ),
    "30-40": (
        _two("DeepFillv2", 15.8, 90.1),
        _two("HiFill", 20.1, 132.0),
        _two(ONE, 12.1, 53.5),
        _two(BOTH, 11.6, 49.2),
    ),
    "center": (
        _two("DeepFillv2", 15.3, 96.3),
        _two("HiFill", 16.9, 115.4),
        _two("Co-ModGAN", 13.7, 86.2),
        _two(ONE, 12.2, 62.8),
        _two(BOTH, 11.9, 57.3),
    ),
}

HOLE_WORDS = {
    "10-20": "free-form, 10 to 20 % of the picture",
    "20-30": "free-form, 20 to 30 % of the picture",
    "30-40": "free-form, 30 to 40 % of the picture",
    "center": "128x128 in the middle of 256x256",
}

_INPAINT = (
    *(
        Table(
            f"inpaint-{hole}", "T9", "inpaint", CTEST10K, 10_000, words,
            (*_HOLES[hole], _ORIGINAL_HOLE),
        )
        for hole, words in HOLE_WORDS.items()
    ),
    *(
        Table(
            f"inpaint-places-{hole}", "T9", "inpaint", PLACES10K, 10_950, words,
            (*_PLACES_HOLES[hole], _ORIGINAL_PLACES),
        )
        for hole, words in HOLE_WORDS.items()
    ),
)  # fmt: skip

_UNCROP = (
    Table(
        "uncrop",
        "T3",
        "uncrop",
        CTEST10K,
        10_000,
        "right half",
        (
            _row("Boundless", 18.7, 104.1, 58.8, 127.9),
            _row("Palette", 5.8, 138.1, 63.4, 85.9),
            _ORIGINAL,
        ),
    ),
    Table(
        "uncrop-places",
        "T3",
        "uncrop",
        PLACES10K,
        10_950,
        "right half",
        (
            _two("Boundless", 11.8, 129.3),
            _two("Palette", 3.53, 103.3),
            _two("original images", 2.1, 0.0),
        ),
        "fool rates of uncropping: Palette 40, Boundless 25, InfinityGAN 15 %",
    ),
    Table(
        "uncrop-top50",
        "T10",
        "uncrop",
        "Places2, top 50 classes",
        0,
        "right half",
        (
            _two("Boundless", 28.3, 115.0),
            _two("Palette", 22.9, 93.4),
            Row("original images", {"fid": 23.6}),
        ),
    ),
    Table(
        "uncrop-scenery",
        "T11",
        "uncrop",
        "Scenery",
        0,
        "right half",
        (Row("InfinityGAN", {"fid": 15.7}), Row("Palette", {"fid": 5.6})),
    ),
)

_HEADER = "the header says FID-5K, the row of the original images is that of ctest10k"

_QUALITIES = {
    5: ((29.0, 73.9, 52.8, 155.4), (8.3, 133.6, 64.2, 95.5)),
    10: ((18.0, 117.2, 63.5, 102.2), (5.4, 180.5, 70.7, 58.3)),
    20: ((11.5, 158.7, 69.7, 65.4), (4.3, 208.7, 73.5, 37.1)),
}

_JPEG = tuple(
    Table(
        f"restore_jpeg-{quality}",
        "T4",
        "restore_jpeg",
        FIRST5K,
        5000,
        f"JPEG quality {quality}",
        (_row("Regression", *baseline), _row("Palette", *ours), _ORIGINAL),
        _HEADER,
    )
    for quality, (baseline, ours) in _QUALITIES.items()
)

_UNSTATED = "pictures and mask are not stated with this table; those of table 9 are meant here"

_ABLATIONS = (
    Table(
        "attention",
        "T5",
        "inpaint",
        CTEST10K,
        10_000,
        "500,000 steps, batch 512; self-attention or something in its place",
        (
            _ablation(DILATED, 8.0, 157.5, 70.6),
            _ablation(BLOCKS, 8.1, 157.1, 71.9),
            _ablation(LOCAL, 9.4, 149.8, 78.2),
            _ablation(GLOBAL, 7.4, 164.8, 67.1),
        ),
        _UNSTATED,
    ),
    Table(
        "loss-inpaint",
        "T6",
        "inpaint",
        CTEST10K,
        10_000,
        "L1 against L2",
        (_loss("Palette (L1)", 3.6, 41.9, 0.11), _loss("Palette (L2)", 3.6, 43.8, 0.13)),
        _UNSTATED,
    ),
    Table(
        "loss-colorize",
        "T6",
        "colorize",
        CTEST10K,
        10_000,
        "L1 against L2",
        (_loss("Palette (L1)", 3.4, 45.8, 0.09), _loss("Palette (L2)", 3.4, 48.0, 0.15)),
    ),
    Table(
        "multitask-inpaint",
        "T7",
        "inpaint",
        CTEST10K,
        10_000,
        HOLE_WORDS["center"],
        (
            _row("Palette, trained on this task", 6.6, 173.9, 69.3, 59.5),
            _row("Palette, trained on three tasks", 6.8, 165.7, 68.9, 65.2),
        ),
    ),
    Table(
        "multitask-colorize",
        "T7",
        "colorize",
        CTEST10K,
        10_000,
        "grey to colour",
        (
            _row("Regression", 5.5, 176.9, 68.0, 61.1),
            _row("Palette, trained on this task", 3.4, 212.9, 72.0, 48.0),
            _row("Palette, trained on three tasks", 3.7, 187.4, 69.4, 57.1),
        ),
    ),
    Table(
        "multitask-restore_jpeg",
        "T7",
        "restore_jpeg",
        FIRST5K,
        5000,
        "JPEG quality 5",
        (
            _row("Regression", 29.0, 73.9, 52.8, 155.4),
            _row("Palette, trained on this task", 8.3, 133.6, 64.2, 95.5),
            _row("Palette, trained on three tasks", 7.0, 137.8, 64.7, 92.4),
        ),
    ),
)

TABLES: dict[str, Table] = {
    table.key: table for table in (*_COLORIZE, *_INPAINT, *_UNCROP, *_JPEG, *_ABLATIONS)
}
"""Every setting that the paper gives figures of, by our name for it."""


MASKS = {
    "center": "inpaint-center",
    "free_form_10_20": "inpaint-10-20",
    "free_form_20_30": "inpaint-20-30",
    "free_form_30_40": "inpaint-30-40",
}
"""Our mask to the setting that was tested with it."""


def nearest(task: str, options: Mapping[str, Any]) -> Table | None:
    """The setting that compares best with a task of these options, else the paper's main one.

    None where the paper has no figures of the task.
    """
    if task == "inpaint":
        return TABLES[MASKS.get(str(options.get("mask")), "inpaint-center")]
    if task == "restore_jpeg":
        return TABLES.get(f"restore_jpeg-{options.get('quality')}", TABLES["restore_jpeg-5"])
    return TABLES.get(task)
