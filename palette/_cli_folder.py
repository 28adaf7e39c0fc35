"""``palette train --name N --images DIR`` and ``palette predict``, as in small DDPM projects."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from palette._cli_arguments import positive

if TYPE_CHECKING:
    from palette.training.folder import Plan

_NUMBERS = {
    "timesteps": ("-t", "noise levels; default: 1000"),
    "epochs": ("-e", "times that every image is seen; default: 100"),
    "image_size": ("-i", "side in pixels; default: 64"),
}


def add_training(train: argparse.ArgumentParser) -> None:
    """Add the options beside ``-b`` to ``palette train``."""
    group = train.add_argument_group(
        "from a folder, without a config (batch size: 64)", "anything else by --set"
    )
    group.add_argument("--name", metavar="N", help="trains in runs/N and ends with N.safetensors")
    group.add_argument("--images", metavar="DIR", help="folder of images, or of class folders")
    for name, (short, text) in _NUMBERS.items():
        long = f"--{name.replace('_', '-')}"
        group.add_argument(short, long, type=positive, metavar="N", help=text)
    group.add_argument("-s", "--beta-schedule", metavar="NAME", help="default: linear")
    group.add_argument(
        "--classes", action="store_true", help="each folder in DIR is a class, drawn by --label"
    )
    group.add_argument("--disable-images", action="store_true", help="no pictures of each epoch")
    group.add_argument("--disable-tensorboard", action="store_true", help="no TensorBoard logs")


def plan(options: argparse.Namespace) -> Plan | None:
    """What ``palette train`` was told of a folder; None where it was told nothing.

    Raises ValueError for arguments that do not go together.
    """
    given = {name: getattr(options, name) for name in _NUMBERS}
    given["schedule"] = options.beta_schedule
    given = {name: value for name, value in given.items() if value is not None}
    if options.images is None:
        alone = {"name": options.name, "disable-images": options.disable_images, **given}
        alone |= {"disable-tensorboard": options.disable_tensorboard, "classes": options.classes}
        for name, value in alone.items():
            if value:
                option = {"schedule": "beta-schedule"}.get(name, name.replace("_", "-"))
                raise ValueError(f"--{option}: goes with --images DIR; a config has its own")
        return None
    if not options.name:
        raise ValueError("--images: wants --name N too, the name of the model")
    if options.config is not None or options.preset is not None:
        raise ValueError("--images: goes without -c and --preset; change options by --set")
    from palette.training.folder import Plan

    if options.batch is not None:
        given["batch_size"] = options.batch
    return Plan(
        options.name,
        Path(options.images),
        **given,
        classes=options.classes,
        pictures=not options.disable_images,
        tensorboard=not options.disable_tensorboard,
    )


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``palette predict`` to the commands of the program."""
    predict = commands.add_parser("predict", help="pictures from a model that generates")
    predict.add_argument("model", metavar="MODEL", help="N.safetensors, or a run directory")
    predict.add_argument("-o", "--output", required=True, metavar="DIR", help="made where missing")
    predict.add_argument(
        "-n", "--name", default="", metavar="PREFIX", help="of the files; default: the model's name"
    )
    predict.add_argument("-i", "--images", type=positive, default=1, metavar="COUNT")
    predict.add_argument("--label", type=int, help="class to draw, from 0; default: any")
    predict.add_argument("--seed", type=int, default=0, help="of the first picture")
    predict.add_argument("--steps", type=positive, help="network evaluations per picture")
    predict.add_argument("--device", default="auto")
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    from palette import pipeline
    from palette.files import generate_files

    written = generate_files(
        pipeline.load(options.model, device=options.device),
        Path(options.output),
        options.name or Path(options.model).stem,
        options.images,
        seed=options.seed,
        steps=options.steps,
        label=options.label,
    )
    for path in written:
        print(path)
    return 0
