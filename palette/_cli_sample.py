"""``palette sample``: a trained model on the user's own images."""

from __future__ import annotations

import argparse
from pathlib import Path

from palette._cli_arguments import SOLVERS, positive
from palette.data.canvas import SIDES


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    sample = commands.add_parser("sample", help="sample from a trained model on your own images")
    sample.add_argument("checkpoint", help="run directory, checkpoint or single file")
    sample.add_argument("--config", help="config to use in place of the saved one")
    sample.add_argument("--input", nargs="+", default=[], help="images, or folders of images")
    sample.add_argument("--output", required=True, metavar="DIR", help="folder for the PNG files")
    sample.add_argument("-n", "--count", type=positive, default=1, help="samples per image")
    sample.add_argument("--steps", type=positive, help="network evaluations per image")
    sample.add_argument("--solver", choices=SOLVERS)
    sample.add_argument("--seed", type=int, default=0, help="seed of the first image")
    sample.add_argument(
        "--reuse",
        type=positive,
        metavar="K",
        help="every K evaluations one is whole, the others reuse its deep features; 1: all whole",
    )
    size = sample.add_mutually_exclusive_group()
    size.add_argument("--native", action="store_true", help="run at the image's own size")
    size.add_argument("--tiled", action="store_true", help="the same in overlapping tiles")
    sample.add_argument("--weights", default="ema", help="ema, raw, or a further average by name")
    sample.add_argument("--device", default="auto")
    sample.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    tasks = sample.add_argument_group("what to do")
    tasks.add_argument("--task", help="which of its tasks a model of several is to do")
    tasks.add_argument(
        "--mask",
        help="to inpaint: white = to be filled; an image, a folder of equal names, or a name "
        "such as center",
    )
    tasks.add_argument("--side", choices=SIDES, help="to uncrop: where to go on; default: all")
    tasks.add_argument("--by", type=float, help="how far, as share of the side; default: half new")
    tasks.add_argument(
        "--rectangle",
        type=int,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="to uncrop: what to show, in pixels of the image; -100 0 ... begins 100 to its left",
    )
    tasks.add_argument(
        "--panorama", type=positive, metavar="WIDTH", help="to uncrop until it is so wide"
    )
    tasks.add_argument("--factor", type=float, help="to upscale: how many times as large")
    tasks.add_argument(
        "--augmentation", type=float, help="to upscale: share of noise in the input, 0 to 1"
    )
    tasks.add_argument("--label", type=int, help="class to draw, from 0")
    tasks.add_argument("--guidance", type=float, help="weight of the label, 1 = as trained")
    tasks.add_argument(
        "--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="to generate"
    )
    tasks.add_argument(
        "--then", nargs="+", default=[], metavar="MODEL", help="upscale the result with these"
    )
    sample.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> int:
    from palette import pipeline
    from palette.files import Wishes, sample_files

    models = [
        pipeline.load(
            checkpoint,
            options.config if number == 0 else None,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
        )
        for number, checkpoint in enumerate((options.checkpoint, *options.then))
    ]
    written = sample_files(
        models,
        [Path(path) for path in options.input],
        Path(options.output),
        Wishes(
            task=options.task,
            mask=options.mask,
            side=options.side,
            by=options.by,
            rectangle=options.rectangle and tuple(options.rectangle),
            panorama=options.panorama,
            factor=options.factor,
            augmentation=options.augmentation,
            size=options.size and (options.size[0], options.size[1]),
        ),
        count=options.count,
        seed=options.seed,
        steps=options.steps,
        solver=options.solver,
        native=options.native,
        tiled=options.tiled,
        label=options.label,
        guidance=options.guidance,
        reuse=options.reuse,
    )
    for path in written:
        print(path)
    return 0
