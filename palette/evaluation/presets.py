"""The paper's experiments by name: how each model is trained, and how it is scored.

A preset is two lists of config overrides. ``palette train --preset NAME`` trains the model of a
row, ``palette evaluate CHECKPOINT --preset NAME`` scores it by the protocol of the table. The lists
of pictures are yours to bring (``--set data.path=...``); they are looked for under the names below.
"""

from __future__ import annotations

import dataclasses

from palette.evaluation.paper import BOTH, CTEST10K, FIRST5K, HOLE_WORDS, PLACES10K, TABLES, Table

LIST_FILES = {
    CTEST10K: "lists/imagenet_ctest10k.txt",
    FIRST5K: "lists/imagenet_val5k.txt",
    PLACES10K: "lists/places2_places10k.txt",
}
TRAIN_FILES = {
    CTEST10K: "lists/imagenet_train.txt",
    FIRST5K: "lists/imagenet_train.txt",
    PLACES10K: "lists/imagenet_places2_train.txt",
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
    "data.image_size=256",
    "data.validation=0",
    "data.batch_size=1024",
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


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of one table."""

    name: str
    table: str
    """Key of ``paper.TABLES``."""
    method: str
    """Row of that table."""
    task: tuple[str, ...]
    """Overrides that say what is done, in training and scoring."""
    scored: tuple[str, ...] = ()
    """Overrides of scoring alone, after those of the task."""
    trained: tuple[str, ...] = ()
    """Overrides of training alone, after those of the task."""

    @property
    def figures(self) -> Table:
        """The paper's table."""
        return TABLES[self.table]

    @property
    def training(self) -> tuple[str, ...]:
        """Config overrides that train the model of this row."""
        return (
            f"run.dir=runs/{self.name}",
            *_NETWORK,
            *_TRAINING,
            f"data.path={TRAIN_FILES[self.figures.data]}",
            *self.task,
            *self.trained,
        )

    @property
    def evaluation(self) -> tuple[str, ...]:
        """Config overrides that score a model by the protocol of this table."""
        return (
            "data.source=list",
            f"data.path={LIST_FILES[self.figures.data]}",
            f"data.limit={self.figures.images}",
            "data.fit=center",
            "data.validation=0",
            *(() if self.trained == _REGRESSION else _SAMPLING),
            *self.task,
            *self.scored,
        )


def find_preset(name: str) -> Preset:
    """A preset by its name. Raises ValueError that lists them all where there is none."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _method(table: str, start: str = "Palette") -> str:
    return next(row.method for row in TABLES[table].rows if row.method.startswith(start))


def _inpainting() -> list[Preset]:
    found = []
    for data, prefix in (("imagenet", "inpaint"), ("places", "inpaint-places")):
        for hole in HOLE_WORDS:
            mask = "center" if hole == "center" else f"free_form_{hole.replace('-', '_')}"
            table = f"{prefix}-{hole}"
            trained, scored = ("task.mask=paper",), (f"task.mask={mask}",)
            found.append(
                Preset(
                    f"inpaint-{data}-{hole}",
                    table,
                    _method(table, "Palette" if data == "imagenet" else BOTH),
                    ("task.name=inpaint",),
                    scored,
                    trained,
                )
            )
    return found


def _uncropping() -> list[Preset]:
    return [
        Preset(
            name,
            table,
            "Palette",
            ("task.name=uncrop",),
            ("task.mask=right",),
            ("task.mask=uncrop",),
        )
        for name, table in (("uncrop-imagenet", "uncrop"), ("uncrop-places", "uncrop-places"))
    ]


def _colorization() -> list[Preset]:
    task = ("task.name=colorize",)
    return [
        Preset("colorize-5k", "colorize", "Palette", task),
        Preset("colorize-10k", "colorize-10k", "Palette (L2)", task),
        Preset("colorize-regression", "colorize", "Regression", task, (), _REGRESSION),
    ]


def _jpeg() -> list[Preset]:
    found = []
    for quality in (5, 10, 20):
        table = f"restore_jpeg-{quality}"
        scored = (f"task.quality={quality}",)
        task = ("task.name=restore_jpeg",)
        found += [
            Preset(f"jpeg-{quality}", table, "Palette", task, scored),
            Preset(f"jpeg-{quality}-regression", table, "Regression", task, scored, _REGRESSION),
        ]
    return found


def _attention() -> list[Preset]:
    """T5. The local attention and the dilated convolutions of the paper are not among these."""
    task, scored = ("task.name=inpaint",), ("task.mask=center",)
    start = "more residual blocks"
    more = (*_ABLATED, "task.mask=paper", "model.attention_resolutions=[]", "model.res_blocks=3")
    plain = (*_ABLATED, "task.mask=paper")
    return [
        Preset("attention-global", "attention", _method("attention"), task, scored, plain),
        Preset("attention-blocks", "attention", _method("attention", start), task, scored, more),
    ]


def _losses() -> list[Preset]:
    found = []
    for name, extra in (("inpaint", ("task.mask=paper",)), ("colorize", ())):
        scored = ("task.mask=center",) if name == "inpaint" else ()
        for loss in ("l1", "l2"):
            trained = (*extra, f"train.loss={loss}")
            method = f"Palette ({loss.upper()})"
            task = (f"task.name={name}",)
            found.append(Preset(f"{name}-{loss}", f"loss-{name}", method, task, scored, trained))
    return found


def _multitask() -> list[Preset]:
    """T7: one model of three tasks against one of each; the specialists are trained as T1 to T4."""
    settings = {
        "inpaint": ("task.name=inpaint", "task.mask=center"),
        "colorize": ("task.name=colorize",),
        "restore_jpeg": ("task.name=restore_jpeg", "task.quality=5"),
    }
    found = []
    for task, scored in settings.items():
        table = f"multitask-{task}"
        for who, words, extra in (
            ("generalist", "three tasks", ("task.name=mixture",)),
            ("specialist", "this task", (f"task.name={task}",)),
        ):
            mask = ("task.mask=paper",) if (task, who) == ("inpaint", "specialist") else ()
            method = f"Palette, trained on {words}"
            name = f"multitask-{task.removeprefix('restore_')}-{who}"
            found.append(Preset(name, table, method, (), scored, (*extra, *mask)))
    return found


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *_inpainting(),
        *_uncropping(),
        *_colorization(),
        *_jpeg(),
        *_attention(),
        *_losses(),
        *_multitask(),
    )
}
"""Every preset by its name."""
