"""``palette prepare``: a folder or list of images into shards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from palette._cli_arguments import positive

_SHOWN = 5  # pictures left out that are named on the terminal; the report has them all


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    prepare = commands.add_parser("prepare", help="check, resize and pack images into tar shards")
    prepare.add_argument("source", metavar="IN", help="folder of images, or text file of paths")
    prepare.add_argument("out", metavar="OUT", help="folder for the shards and report.json")
    prepare.add_argument(
        "--size", type=positive, metavar="N", help="shorter side of larger pictures, in pixels"
    )
    prepare.add_argument(
        "--min-size", type=positive, default=1, metavar="N", help="leave out what is smaller"
    )
    length = prepare.add_mutually_exclusive_group()
    length.add_argument(
        "--shard-size", type=positive, default=256, metavar="MB", help="megabytes; default: 256"
    )
    length.add_argument("--images-per-shard", type=positive, metavar="N", help="in place of that")
    prepare.add_argument("--keep-duplicates", action="store_true", help="also the same file twice")
    prepare.add_argument(
        "--workers", type=positive, metavar="N", help="processes; default: one for each core"
    )
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from palette.data.prepare import REPORT, Settings, prepare

    by_count = options.images_per_shard is not None
    settings = Settings(
        size=options.size,
        min_size=options.min_size,
        keep_duplicates=options.keep_duplicates,
        shard_bytes=None if by_count else options.shard_size * 10**6,
        shard_pictures=options.images_per_shard,
    )
    out = Path(options.out)
    try:
        report = prepare(options.source, out, settings, workers=options.workers or _cores())
    except KeyboardInterrupt:
        print("palette: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join(_lines(report, out)))
    print(out / REPORT)
    return 0


def _lines(report: dict[str, Any], out: Path) -> list[str]:
    shards, named = report["shards"], report["named"]
    left_out = ", ".join(f"{count} {fault}" for fault, count in report["left_out"].items())
    megabytes = sum(shard["bytes"] for shard in shards) / 1e6
    lines = [
        f"{report['pictures']} images: {report['kept']} kept ({report['resized']} resized), "
        f"left out: {left_out}",
        *(f"{each['fault']}: {each['reason']}" for each in named[:_SHOWN]),
        f"{len(shards)} shards, {megabytes:.1f} MB; train with data.source=shards data.path={out}",
    ]
    if len(named) > _SHOWN:
        lines.insert(-1, f"and {len(named) - _SHOWN} more")
    return lines


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
