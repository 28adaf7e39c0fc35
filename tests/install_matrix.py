"""Every way to install, each from a fresh copy of the checkout into an environment of its own.

Not collected by a plain ``pytest``: it takes minutes. CI runs ``pytest tests/install_matrix.py`` in
an environment that also has pybind11, ninja, build, uv, kernels and diffusers; the environments
made here see that one's packages, so nothing large is installed twice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = Path(sysconfig.get_path("purelib"))
NO_NVCC = {"CUDA_HOME": "/nonexistent"}
HAS_NVCC = shutil.which("nvcc") is not None

PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import palette.ops
    from palette import _extension
import torch
x = torch.randn(2, 8, 3, 3)
y = palette.ops.group_norm_silu(x, None, None, 4)
print(json.dumps({
    "package": palette.__file__,
    "cpp": str(_extension.load()["cpp"].library),
    "why": _extension.status(),
    "warnings": [str(w.message) for w in caught if "palette" in str(w.message)],
    "right": torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)),
                            atol=1e-5),
}))
"""


def checkout(place: Path) -> Path:
    """The files that git knows or would add, copied: no build leftovers."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    return place


class Environment:
    """A virtual environment that sees every package of the running one, except palette."""

    def __init__(self, place: Path, without: tuple[str, ...] = ()) -> None:
        venv.EnvBuilder(symlinks=True).create(place)
        self.place = place
        self.bin = place / "bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = place / "lib" / version / "site-packages"
        hidden = ("palette", "__editable__", "__pycache__", *without)
        for entry in PACKAGES.iterdir():
            if not entry.name.startswith(hidden):
                (self.site / entry.name).symlink_to(entry)

    def run(self, *command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        clean["PATH"] = f"{self.bin}{os.pathsep}{clean['PATH']}"
        clean["VIRTUAL_ENV"] = str(self.place)
        clean.setdefault("TORCH_CUDA_ARCH_LIST", "8.0")
        return subprocess.run(
            command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
        )

    def python(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Standard output of a Python command that must succeed."""
        done = self.run(str(self.bin / "python"), *arguments, cwd=cwd, **environment)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def pip(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Everything that an installation that must succeed has said."""
        command = [str(self.bin / "python"), "-m", "pip", "install", "-v", *arguments]
        done = self.run(*command, cwd=cwd, **environment)
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, said
        return said

    def probe(self, cwd: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.python("-c", PROBE, cwd=cwd).splitlines()[-1])
        assert found["right"]
        for kernel in (ROOT / "kernels").glob("*.py"):
            name = f"palette.kernels.{kernel.stem}"
            spec = f"import importlib.util as u; assert u.find_spec({name!r}) is not None"
            self.python("-c", spec, cwd=cwd)
        return found

    def works_everywhere(self, source: Path, elsewhere: Path) -> None:
        """From the repository's root (whose sources win there) and from another directory."""
        for cwd in (source, elsewhere):
            found = self.probe(cwd)
            assert Path(found["cpp"]).name == "_ops_cpu.so", found
            assert found["warnings"] == []
            self.python("-m", "palette", "info", cwd=cwd)
        done = self.run(str(self.bin / "palette"), "info", cwd=elsewhere)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkout(tmp_path / "source")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_plain(environment: Environment, source: Path, elsewhere: Path) -> None:
    environment.pip(".", cwd=source)
    environment.works_everywhere(source, elsewhere)
    found = environment.probe(elsewhere)
    assert Path(found["package"]).is_relative_to(environment.site)
    assert (environment.site / "palette" / "_ops_cuda.so").is_file() == HAS_NVCC
    beside = "import kernels, diffusers, palette.ops; print(kernels.__file__)"
    file = environment.python("-c", beside, cwd=source).splitlines()[-1]
    assert Path(file).is_relative_to(environment.site)


def test_editable_with_isolation(environment: Environment, source: Path, elsewhere: Path) -> None:
    environment.pip("-e", ".", cwd=source, **NO_NVCC)
    environment.works_everywhere(source, elsewhere)


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_editable(environment: Environment, source: Path, elsewhere: Path, mode: str) -> None:
    settings = ["--config-settings", f"editable_mode={mode}"]
    options = ["--no-build-isolation", "--no-deps", *settings]
    environment.pip(*options, "-e", ".", cwd=source, **NO_NVCC)
    environment.works_everywhere(source, elsewhere)


def test_sdist_then_wheel(environment: Environment, source: Path, elsewhere: Path) -> None:
    environment.python("-m", "build", cwd=source, **NO_NVCC)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    module, library = sorted(name for name in names if name.endswith(".so"))
    assert module.startswith("palette/_build.")
    assert library == "palette/_ops_cpu.so"
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"palette", next(root for root in roots if root.endswith(".dist-info"))}
    environment.pip("--no-deps", str(wheel), cwd=elsewhere)
    environment.works_everywhere(source, elsewhere)


def test_uv(environment: Environment, source: Path, elsewhere: Path) -> None:
    python = str(environment.bin / "python")
    command = ["uv", "pip", "install", "--python", python, "--no-build-isolation", "--no-deps"]
    done = environment.run(*command, ".", cwd=source, **NO_NVCC)
    assert done.returncode == 0, done.stderr
    environment.works_everywhere(source, elsewhere)


def test_no_compiler(tmp_path: Path, source: Path, elsewhere: Path) -> None:
    environment = Environment(tmp_path / "bare", without=("triton",))
    said = environment.pip("--no-deps", ".", cwd=source, CXX="/nonexistent/c++")
    assert "building without cpp: no C++ compiler was found" in said
    for cwd in (source, elsewhere):
        found = environment.probe(cwd)
        assert found["cpp"] == "None"
        assert len(found["warnings"]) == 1
        assert "Install a C++ compiler" in found["warnings"][0]
        environment.python("-m", "palette", "info", cwd=cwd)


def test_pure_python(environment: Environment, source: Path, elsewhere: Path) -> None:
    options = ["--no-build-isolation", "--no-deps"]
    environment.pip(*options, ".", cwd=source, PALETTE_NO_EXT="1")
    assert environment.probe(elsewhere)["cpp"] == "None"
    assert not list((environment.site / "palette").glob("*.so"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"PALETTE_REQUIRE": "cpp", "CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ({"PALETTE_REQUIRE": "cpp,cuda", **NO_NVCC}, "nvcc was not found"),
        ({"PALETTE_REQUIRE": "rust"}, "unknown half 'rust'"),
    ],
)
def test_a_required_half_that_is_missing_fails(
    environment: Environment, source: Path, settings: dict[str, str], line: str
) -> None:
    options = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    python = str(environment.bin / "python")
    done = environment.run(python, *options, cwd=source, **settings)
    assert done.returncode != 0
    assert line in done.stdout + done.stderr
    assert not (environment.site / "palette").exists()
