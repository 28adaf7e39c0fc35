"""The paper's experiments by name: how each model is trained, and how it is scored.

A preset is a row of a table: which model it takes and how that is scored, as config overrides.
``palette train --preset NAME`` trains the model, which several rows may share; ``palette evaluate
runs/MODEL --preset NAME`` scores it. The lists of pictures are yours to bring (``--set
data.path=...``); they are looked for under the names below.
"""

from __future__ import annotations

import dataclasses

from palette.evaluation.paper import (
    BLOCKS,
    BOTH,
    CTEST10K,
    DILATED,
    FIRST5K,
    GLOBAL,
    LOCAL,
    MASKS,
    ONE,
    PLACES10K,
    TABLES,
    Table,
)

LIST_FILES = {
    CTEST10K: "lists/imagenet_ctest10k.txt",
    FIRST5K: "lists/imagenet_val5k.txt",
    PLACES10K: "lists/places2_places10k.txt",
}

# Section 4 and appendix A: the 552M-parameter network of ADM without classes, and its training.
_NETWORK = (
    "model.channels=256",
    "model.channel_mults=[1,1,2,2,4,4]",
    "model.res_blocks=2",
    "model.attention_resolutions=[32,16,8]",
    "model.head_channels=64",
)
_TRAINING = (
    "data.source=list",
    "data.path=lists/imagenet_train.txt",
    "data.image_size=256",
    "data.validation=0",
    "data.batch_size=1024",
    "data.workers=8",
    "train.steps=1000000",
    "train.lr=1e-4",
    "train.warmup=10000",
    "train.ema_decay=0.9999",
    "train.loss=l2",
)
_ABLATED = ("train.steps=500000", "data.batch_size=512")  # table 5 alone
_SAMPLING = (
    "sample.solver=ddpm",
    "sample.steps=1000",
    "sample.grid=published",
    "sample.start=1e-4",
    "sample.end=0.09",
)
_REGRESSION = ("model.prediction=regression", "sample.steps=1")
_PAPER_MASK = "task.mask=paper"
_HOLES = ("task.name=inpaint", _PAPER_MASK)
_BOTH_LISTS = "data.path=lists/imagenet_places2_train.txt"

_COLORIZE = ("task.name=colorize",)
_CENTER = ("task.name=inpaint", "task.mask=center")
_RIGHT = ("task.name=uncrop", "task.mask=right")

# Name of each model, which is trained into runs/NAME, to what distinguishes it.
MODELS: dict[str, tuple[str, ...]] = {
    "colorize": ("task.name=colorize",),
    "colorize-l1": ("task.name=colorize", "train.loss=l1"),
    "colorize-regression": ("task.name=colorize", *_REGRESSION),
    "inpaint-imagenet": _HOLES,
    "inpaint-places": (*_HOLES, _BOTH_LISTS),
    "inpaint-l1": (*_HOLES, "train.loss=l1"),
    "inpaint-attention": (*_HOLES, *_ABLATED),
    "inpaint-local": (*_HOLES, *_ABLATED, "model.attention=local"),
    "inpaint-blocks": (*_HOLES, *_ABLATED, "model.attention=resblocks"),
    "inpaint-dilated": (*_HOLES, *_ABLATED, "model.attention=dilated"),
    "uncrop-imagenet": ("task.name=uncrop", "task.mask=uncrop"),
    "uncrop-places": ("task.name=uncrop", "task.mask=uncrop", _BOTH_LISTS),
    "jpeg": ("task.name=restore_jpeg",),
    "jpeg-regression": ("task.name=restore_jpeg", *_REGRESSION),
    "generalist": ("task.name=mixture", "task.tasks=[restore_jpeg,inpaint,colorize]", _PAPER_MASK),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of one table."""

    name: str
    model: str
    """Key of :data:`MODELS`."""
    table: str
    """Key of ``paper.TABLES``."""
    method: str
    """Row of that table."""
    scored: tuple[str, ...]
    """Config overrides that say what the model is asked to do."""

    @property
    def figures(self) -> Table:
        """The paper's table."""
        return TABLES[self.table]

    @property
    def training(self) -> tuple[str, ...]:
        """Config overrides that train the model of this row."""
        return (f"run.dir=runs/{self.model}", *_NETWORK, *_TRAINING, *MODELS[self.model])

    @property
    def evaluation(self) -> tuple[str, ...]:
        """Config overrides that score a model by the protocol of this table."""
        return (
            "data.source=list",
            f"data.path={LIST_FILES[self.figures.data]}",
            f"data.limit={self.figures.images}",
            "data.fit=center",
            "data.validation=0",
            *(() if self.method == "Regression" else _SAMPLING),
            *self.scored,
        )


def find_preset(name: str) -> Preset:
    """A preset by its name. Raises ValueError that lists them all where there is none."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _inpainting() -> list[Preset]:
    """T2 and T9."""
    found = []
    for model, prefix, method in (
        ("inpaint-imagenet", "inpaint", ONE),
        ("inpaint-places", "inpaint-places", BOTH),
    ):
        for mask, table in MASKS.items():
            hole = table.removeprefix("inpaint-")
            scored = ("task.name=inpaint", f"task.mask={mask}")
            found.append(Preset(f"{model}-{hole}", model, f"{prefix}-{hole}", method, scored))
    return found


def _jpeg() -> list[Preset]:
    """T4."""
    found = []
    for quality in (5, 10, 20):
        scored = ("task.name=restore_jpeg", f"task.quality={quality}")
        for model, method in (("jpeg", "Palette"), ("jpeg-regression", "Regression")):
            name = model.replace("jpeg", f"jpeg-{quality}")
            found.append(Preset(name, model, f"restore_jpeg-{quality}", method, scored))
    return found


def _multitask() -> list[Preset]:
    """T7: one model of three tasks against one of each."""
    settings = {
        "inpaint": ("inpaint-imagenet", _CENTER),
        "colorize": ("colorize", _COLORIZE),
        "jpeg": ("jpeg", ("task.name=restore_jpeg", "task.quality=5")),
    }
    found = []
    for task, (specialist, scored) in settings.items():
        table = "multitask-restore_jpeg" if task == "jpeg" else f"multitask-{task}"
        for kind, model, words in (
            ("generalist", "generalist", "three tasks"),
            ("specialist", specialist, "this task"),
        ):
            method = f"Palette, trained on {words}"
            found.append(Preset(f"multitask-{task}-{kind}", model, table, method, scored))
    return found


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("colorize-5k", "colorize", "colorize", "Palette", _COLORIZE),
        Preset("colorize-10k", "colorize", "colorize-10k", "Palette (L2)", _COLORIZE),
        Preset("colorize-regression", "colorize-regression", "colorize", "Regression", _COLORIZE),
        *_inpainting(),
        Preset("uncrop-imagenet", "uncrop-imagenet", "uncrop", "Palette", _RIGHT),
        Preset("uncrop-places", "uncrop-places", "uncrop-places", "Palette", _RIGHT),
        *_jpeg(),
        Preset("attention-global", "inpaint-attention", "attention", GLOBAL, _CENTER),
        Preset("attention-local", "inpaint-local", "attention", LOCAL, _CENTER),
        Preset("attention-blocks", "inpaint-blocks", "attention", BLOCKS, _CENTER),
        Preset("attention-dilated", "inpaint-dilated", "attention", DILATED, _CENTER),
        Preset("inpaint-l1", "inpaint-l1", "loss-inpaint", "Palette (L1)", _CENTER),
        Preset("inpaint-l2", "inpaint-imagenet", "loss-inpaint", "Palette (L2)", _CENTER),
        Preset("colorize-l1", "colorize-l1", "loss-colorize", "Palette (L1)", _COLORIZE),
        Preset("colorize-l2", "colorize", "loss-colorize", "Palette (L2)", _COLORIZE),
        *_multitask(),
    )
}
"""Every preset by its name."""
