"""What the benchmarks stand on: they import with little, and print no figure for a faulty op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import proven
import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import importlib, sys
for name in ("omegaconf", "diffusers"):
    sys.modules[name] = None
sys.path[:0] = ["benchmarks"]
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("op", ["sampling", "reverse_step", "attention", "group_norm_silu"])
def test_imported_on_a_machine_with_torch_and_little_else(op: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, f"bench_{op}"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


class Cache(dict):
    """The two methods of pytest's cache."""

    set = dict.__setitem__


@pytest.mark.parametrize(
    ("outcomes", "status", "remembered"),
    [
        (["passed", "passed"], pytest.ExitCode.OK, True),
        (["passed", "failed", "passed"], pytest.ExitCode.TESTS_FAILED, False),
        (["passed"], pytest.ExitCode.INTERRUPTED, False),
    ],
    ids=["whole", "with a failure", "stopped"],
)
def test_an_op_is_remembered_when_all_its_tests_passed(
    monkeypatch, outcomes, status, remembered
) -> None:
    monkeypatch.setattr(proven, "_failed", {})
    cache = Cache({"palette/proven/noise": "of an earlier run"})
    for outcome in outcomes:
        report = SimpleNamespace(
            nodeid="tests/ops/test_noise.py::test_normals[cuda-on-cuda]", when="call",
            failed=outcome == "failed",
        )  # fmt: skip
        proven.pytest_runtest_logreport(report)
    proven.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(cache=cache)), status)
    assert (cache["palette/proven/noise"] == proven._digest()) == remembered
    if remembered:
        assert proven.failure("noise", cache) == ""
