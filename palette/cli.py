"""The command line: reads arguments, calls the library, turns mistakes into one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from palette import _cli_evaluate, _cli_folder, _cli_prepare, _cli_sample
from palette._cli_arguments import SOLVERS, positive

if TYPE_CHECKING:
    from palette.config import Config
    from palette.upstream import Settings

# Imports of torch and of the rest stand inside the commands: ``palette --help`` answers at once.

DONE, FAILED, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed while working, 2 usage or configuration; 128 + n after signal n.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except Exception as error:
        if options.debug:
            raise
        print(f"palette: {_one_line(error)}", file=sys.stderr)
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    from palette.checkpoint import CheckpointError
    from palette.data.dataset import UnreadableImages
    from palette.data.images import UnreadableImage

    if isinstance(error, (CheckpointError, UnreadableImage, UnreadableImages)):
        return FAILED
    return USAGE if isinstance(error, (ValueError, FileNotFoundError)) else FAILED


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="palette", description="Palette image-to-image diffusion")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _cli_sample.add(commands)
    _cli_folder.add(commands)
    _add_test(commands)
    _cli_evaluate.add(commands)
    _cli_prepare.add(commands)
    _add_convert(commands)
    _add_report(commands)
    _add_info(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser("train", help="train a model from a config")
    train.add_argument("-c", "--config", metavar="CONFIG", help="YAML, or a published JSON config")
    train.add_argument(
        "--resume", metavar="auto|PATH", help="continue the run, or from a given checkpoint"
    )
    train.add_argument("--preset", help="a row of the paper's tables, such as colorize-5k")
    _cli_folder.add_training(train)
    _add_config_options(train)
    train.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    train.add_argument("--help-config", action="store_true", help="print every option, and stop")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from palette import config as configs

    if options.help_config:
        print(configs.help_text())
        return DONE
    if options.preset is not None:
        from palette.evaluation.presets import find_preset

        options.overrides = [*find_preset(options.preset).training, *options.overrides]
    plan = _cli_folder.plan(options)
    if plan is None:
        config, _ = _read_config(options, "train")
    else:
        from palette.training.folder import configure

        _choose_gpus(options)
        config = configure(plan, options.overrides)
    from palette.training import run

    if options.dry_run:
        print(run.dry_run(config))
    else:
        run.train(config, resume=options.resume, export=None if plan is None else plan.target)
    return DONE


def _add_config_options(command: argparse.ArgumentParser) -> None:
    """``--set``, and what the published command line has beside ``-c``."""
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides"
    )
    command.add_argument("-p", "--phase", choices=("train", "test"), help="the command itself")
    command.add_argument(
        "-b", "--batch", "--batch-size", type=positive, help="batch size of each process"
    )
    command.add_argument("-gpu", "--gpu_ids", metavar="IDS", help="GPUs to use, such as 0,1")
    command.add_argument("-d", action="store_true", dest="debugging", help="the debug options")
    command.add_argument("-P", "--port", help="unused: torchrun chooses one")


def _read_config(options: argparse.Namespace, phase: str) -> tuple[Config, Settings | None]:
    """The config of -c, with what the command line says of it."""
    if options.config is None and getattr(options, "preset", None) is not None:
        from palette import config as configs

        return configs.from_sections({}, overrides=options.overrides), None
    if options.config is None:
        raise ValueError(f"{phase}: no config given; say palette {phase} -c CONFIG")
    if options.phase not in (None, phase):
        raise ValueError(f"-p {options.phase}: this is {phase}; say palette {options.phase} -c …")
    if options.port is not None:
        print(f"-P {options.port}: not used; torchrun chooses the port", file=sys.stderr)
    _choose_gpus(options)
    from palette import upstream

    return upstream.read_run(
        options.config,
        phase,
        batch_size=options.batch,
        gpus=None if options.gpu_ids is None else len(options.gpu_ids.split(",")),
        debug=options.debugging,
        overrides=options.overrides,
    )


def _choose_gpus(options: argparse.Namespace) -> None:
    if options.gpu_ids is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpu_ids  # read when CUDA is first asked for


def _add_test(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    test = commands.add_parser("test", help="restore a data set, beside the truth, and score it")
    test.add_argument("-c", "--config", metavar="CONFIG", help="YAML, or a published JSON config")
    test.add_argument(
        "checkpoint", nargs="?", help="default: resume_state of a JSON config, run.dir of a YAML"
    )
    _add_config_options(test)
    test.add_argument("--steps", type=positive, help="network evaluations per image")
    test.add_argument("--solver", choices=SOLVERS)
    test.add_argument("--weights", default="ema", help="ema, raw, or a further average by name")
    test.add_argument("--device", default="auto")
    test.set_defaults(run=_test)


def _test(options: argparse.Namespace) -> int:
    from palette import restore

    config, published = _read_config(options, "test")
    scores = restore.run(
        config,
        published,
        options.checkpoint,
        weights=options.weights,
        device=options.device,
        steps=options.steps,
        solver=options.solver,
    )
    count = len(scores["images"])
    results = Path(config.run.dir) / restore.RESULTS
    print((results / "scores.txt").read_text(encoding="utf-8"))
    print(f"MAE {scores['mae']:.6f} ({scores['mae_255']:.2f} of 255) over {count} images")
    print(results)
    return DONE


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser("convert", help="another program's checkpoint as a file of ours")
    convert.add_argument("source", metavar="IN", help="checkpoint, or run directory of ours")
    convert.add_argument("target", metavar="OUT", help="file to write, .safetensors")
    convert.add_argument("--config", help="ours or a published JSON config; default: inferred")
    convert.add_argument(
        "--image-size", type=positive, help="training size, where no config says it; default: 256"
    )
    convert.add_argument("--weights", default="ema", help="ema, raw, or a further average by name")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from palette.convert import convert

    report = convert(
        Path(options.source),
        Path(options.target),
        None if options.config is None else Path(options.config),
        image_size=options.image_size,
        weights=options.weights,
    )
    print("\n".join(report))
    return DONE


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="one HTML page of a run: curves, samples, config")
    report.add_argument("run_dir", metavar="RUN", help="run directory, also of a run going on")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from palette.training import report

    print(report.write(Path(options.run_dir)))
    return DONE


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser("info", help="versions, devices and the backends of each op")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from palette.info import facts, text

    print(json.dumps(facts(), indent=2) if options.json else text(facts()))
    return DONE
