"""The published Palette code's interface, configs and checkpoints, on our engine."""

from __future__ import annotations

from palette.upstream.network import Network

__all__ = ["Network"]
