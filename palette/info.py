"""What this machine has, and what each op will run on: the text of ``palette info``."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

import palette
from palette import _extension, ops

_LIBRARIES = ("torch", "triton", "numpy", "pillow", "safetensors", "scikit-image")


def facts() -> dict[str, Any]:
    """Versions, devices, instruction sets and, for each op, its backends, as plain data."""
    return {
        "palette": palette.__version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": _devices(),
        "instruction sets": _extension.instruction_sets(),
        "build": _extension.build_facts(),
        "ops": {op: _op(op) for op in ops.names()},
    }


def machine() -> dict[str, Any]:
    """Where and when something is measured, without which its figures are worth nothing."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "date": date.today().isoformat(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def text(found: dict[str, Any]) -> str:
    """``facts()`` for a person."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    lines = [
        f"palette {found['palette']}, Python {found['python']}, {libraries}",
        f"devices: {', '.join(found['devices'])}",
        f"instruction sets: {', '.join(found['instruction sets']) or 'unknown (nothing compiled)'}",
        "compiled: " + (", ".join(f"{k} {v}" for k, v in found["build"].items() if v) or "nothing"),
        "",
    ]
    for op, row in found["ops"].items():
        used = ", ".join(f"{name} on {device}" for device, name in row["used"].items())
        lines.append(f"{op}: {used}; available: {', '.join(row['available'])}")
        lines += [f"  no {name}: {reason}" for name, reason in row["absent"].items()]
    return "\n".join(lines)


def _op(op: str) -> dict[str, Any]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "available": ops.backends(op),
        "used": {device: ops.default(op, device) for device in devices},
        "absent": ops.absences(op),
    }


def _devices() -> list[str]:
    cpu = f"cpu ({torch.get_num_threads()} threads)"
    count = torch.cuda.device_count()
    return [cpu, *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
