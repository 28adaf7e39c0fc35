"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse

SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde", "ddim", "ddpm", "unipc")


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wants an integer of at least 1")
    return value
