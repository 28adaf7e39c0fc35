"""``palette evaluate``: samples of a model, or a folder of pictures, scored."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from palette._cli_arguments import SOLVERS, positive

if TYPE_CHECKING:
    from palette.evaluation.plan import Request
    from palette.evaluation.scoring import Scoring
    from palette.training.distributed import World


_SAMPLING = {
    "samples_per_input": 1,
    "limit": None,
    "weights": ["ema"],
    "seed": 0,
    "steps": None,
    "solver": None,
    "precision": "auto",
}
"""What says nothing to pictures that are there already. The defaults are filled in later, so that
it shows what was given."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    command = commands.add_parser(
        "evaluate", help="sample from a model and score it, or score two folders of pictures"
    )
    command.add_argument(
        "checkpoint", nargs="?", help="run directory, checkpoint or file; default: run.dir"
    )
    command.add_argument("-c", "--config", help="default: the one saved with the checkpoint")
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides"
    )
    command.add_argument("--preset", help="a row of the paper's tables, such as colorize-5k")
    command.add_argument(
        "--output",
        metavar="DIR",
        help="default: evaluation/NAME in the run directory, by preset or else weights",
    )
    command.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    _add_sampling(command.add_argument_group("sampling"))
    _add_folders(command.add_argument_group("pictures that are there already"))
    _add_scoring(command.add_argument_group("scoring; nothing is ever downloaded"))
    _add_human(command.add_argument_group("a two-choice trial for people"))
    command.set_defaults(run=_evaluate)


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--samples-per-input", type=positive, metavar="N", help="default: 1")
    group.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="evaluated at once"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="the first so many inputs only")
    group.add_argument(
        "--weights",
        type=lambda text: text.split(","),
        help="ema (the default), raw, or a further average by name; several with commas: ema,raw",
    )
    group.add_argument("--seed", type=int, help="of the first input's first sample; default: 0")
    group.add_argument("--steps", type=positive, help="network evaluations per sample")
    group.add_argument("--solver", choices=SOLVERS)
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"))


def _add_folders(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--samples", metavar="DIR", help="pictures to score; needs --truth")
    group.add_argument("--truth", metavar="DIR", help="of the same names (x for samples x_0, x_1)")
    group.add_argument(
        "--masks", metavar="DIR", help="white is the hole; one file or one of a name"
    )
    group.add_argument("--unpaired", action="store_true", help="two sets of pictures as such")
    group.add_argument("--size", type=positive, help="crop and resize all to this side [pixels]")


def _add_scoring(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--reference", metavar="DIR", help="real pictures for FID, KID, recall")
    group.add_argument(
        "--cache", metavar="DIR", help="of the reference's statistics; default: in output"
    )
    group.add_argument("--inception", metavar="PATH", help="such as inception-2015-12-05.pt")
    group.add_argument(
        "--network", default="random", help="random, torch-fidelity[=FILE], torchvision:NAME[=FILE]"
    )
    group.add_argument(
        "--lpips", default="random", help="random, alex[=FILE], vgg[=FILE], or a TorchScript file"
    )
    group.add_argument("--classifier", help="for CA: torchvision:NAME[=FILE] or a TorchScript file")
    group.add_argument("--labels", help="for CA: file of '<name> <class>' lines, or folders")


def _add_human(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--human", action="store_true", help="write human.html beside the page")
    group.add_argument(
        "--human-seconds",
        type=float,
        default=3.0,
        metavar="S",
        help="how long each pair is seen (default: 3; the paper: 3 and 5)",
    )
    group.add_argument(
        "--human-seed", type=int, default=0, metavar="N", help="another order for another rater"
    )


def _evaluate(options: argparse.Namespace) -> int:
    _check(options)
    for name, default in _SAMPLING.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    try:
        return _score_folders(options) if options.samples else _score_model(options)
    except KeyboardInterrupt:
        print("palette: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _score_model(options: argparse.Namespace) -> int:
    requests = [_request(options, weights) for weights in options.weights]
    if options.dry_run:
        print("\n\n".join(_dry_run(options, request) for request in requests))
        return 0
    from palette.evaluation.run import evaluate
    from palette.metrics.scores import side_by_side
    from palette.training.distributed import world

    with world(options.device) as processes:
        scoring, found = _scoring(options, processes), {}
        for request in requests:
            output = _output(options, request)
            found[request.weights] = evaluate(request, output, scoring, processes)
            if processes.is_first:
                print(f"{found[request.weights].table()}\n{_pages(output, options)}\n")
        if processes.is_first and len(found) > 1:
            print(side_by_side(found), end="")
    return 0


def _score_folders(options: argparse.Namespace) -> int:
    samples, truth = Path(options.samples), Path(options.truth)
    if options.dry_run:
        from palette.evaluation import describe

        print(describe.folders(samples, truth, not options.unpaired))
        return 0
    from palette.evaluation.run import score_existing
    from palette.training.distributed import world

    output = None if options.output is None else Path(options.output)
    with world(options.device) as processes:
        scores = score_existing(
            samples,
            truth,
            output,
            _scoring(options, processes),
            processes,
            masks=None if options.masks is None else Path(options.masks),
            paired=not options.unpaired,
        )
        if processes.is_first:
            print(scores.table(), end="")
            if output is not None:
                print(f"\n{_pages(output, options)}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for arguments that do not go together."""
    if options.human:
        from palette.evaluation import human

        human.check(options.human_seed, options.human_seconds)
    if (options.samples is None) != (options.truth is None):
        raise ValueError("--samples and --truth: both are wanted, or a checkpoint")
    if (options.classifier is None) != (options.labels is None):
        raise ValueError("--classifier and --labels: both are wanted, for CA")
    if options.samples is None:
        for name in ("masks", "unpaired", "size"):
            if getattr(options, name):
                raise ValueError(f"--{name}: goes with --samples and --truth")
        if not (options.checkpoint or options.config or options.preset):
            raise ValueError("evaluate: wanted is a checkpoint, or --samples DIR --truth DIR")
        return
    for name in ("checkpoint", "config", "preset", "overrides", *_SAMPLING):
        if getattr(options, name) not in (None, []):
            said = name.replace("_", "-")
            raise ValueError(f"{said}: does not go with --samples, which are there already")
    if options.unpaired and options.output:
        raise ValueError("--output: shows samples beside their truth, which --unpaired has none of")
    if options.human and not options.output:
        raise ValueError("--human: needs --output DIR to write its page to")


def _dry_run(options: argparse.Namespace, request: Request) -> str:
    from palette.evaluation import describe

    names = ("inception", "network", "lpips", "classifier", "labels", "reference")
    scoring = {name: getattr(options, name) for name in names}
    return describe.evaluation(request, _output(options, request), scoring)


def _request(options: argparse.Namespace, weights: str) -> Request:
    from palette.evaluation import presets, run
    from palette.evaluation.plan import Request

    preset = None if options.preset is None else presets.find_preset(options.preset)
    given = [] if preset is None else list(preset.evaluation)
    if options.checkpoint is None and options.config is None and preset is not None:
        given = [*preset.training, *given]  # what a model of this preset would bring along
    config, split = run.read_config(
        options.checkpoint, options.config, [*given, *options.overrides]
    )
    return Request(
        checkpoint=options.checkpoint or config.run.dir,
        config=config,
        split=split,
        weights=weights,
        samples_per_input=options.samples_per_input,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        steps=options.steps,
        solver=options.solver,
        precision=options.precision,
        preset=options.preset,
        command=("palette", *sys.argv[1:]),
        table=None if preset is None else preset.table,
    )


def _pages(output: Path, options: argparse.Namespace) -> str:
    """What to look at in the folder of an evaluation."""
    pages = [output / "index.html"]
    if options.human:
        from palette.evaluation import human

        seed, seconds = options.human_seed, options.human_seconds
        pages.append(human.write(output, seed=seed, seconds=seconds))
    return "\n".join(map(str, pages))


def _output(options: argparse.Namespace, request: Request) -> Path:
    """The folder of an evaluation; of several weights each has its own."""
    if options.output is not None:
        where = Path(options.output)
    elif request.preset is not None:
        where = _run_folder(request) / "evaluation" / request.preset
    else:
        return _run_folder(request) / "evaluation" / request.weights
    return where / request.weights if len(options.weights) > 1 else where


def _run_folder(request: Request) -> Path:
    """The run that the checkpoint lies in, which may have moved; or else what its config says."""
    from palette.checkpoint import steps

    path = Path(request.checkpoint)
    runs = (folder for folder in (path, *path.parents) if steps(folder))
    return next(runs, Path(request.config.run.dir))


def _scoring(options: argparse.Namespace, processes: World) -> Scoring:
    from palette.evaluation.networks import open_networks
    from palette.evaluation.scoring import Scoring

    networks = open_networks(
        options.inception,
        options.network,
        options.lpips,
        options.classifier,
        device=processes.device,
    )
    return Scoring(
        networks,
        reference=None if options.reference is None else Path(options.reference),
        cache=None if options.cache is None else Path(options.cache),
        labels=options.labels,
        batch_size=options.batch_size,
        size=None if options.size is None else (options.size, options.size),
    )
