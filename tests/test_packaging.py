"""The mechanics of a checkout, and what a wheel and an sdist contain.

What it takes to install (editable modes, other installers, missing compilers) is proven by
``tests/install_matrix.py``, which CI runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from palette import _extension

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("palette", "kernels", "csrc", "configs", "tests", "benchmarks")
COMPILED = [place for place in _extension._places() if (place / "_ops_cpu.so").is_file()]

needs_compiled = pytest.mark.skipif(
    not COMPILED, reason="palette was installed here without a compiler"
)


def copy_sources(target: Path) -> Path:
    """The files of a checkout without what was built in it."""
    for name in filter(lambda name: (ROOT / name).is_dir(), PARTS):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sys.path with the compiled files of this installation in it."""
    place = tmp_path_factory.mktemp("installed")
    (place / "palette").mkdir()
    for file in COMPILED[0].glob("*.so"):
        shutil.copy(file, place / "palette")
    return place


def python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as ``python -c`` in ``cwd``, with ``path`` first among the installed places."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


LOAD = """
import json
import palette.ops
from palette import _extension
library = _extension.load()["cpp"].library
print(json.dumps([palette.__file__, str(library), _extension.status()["cpp"]]))
"""


@needs_compiled
def test_root_of_a_checkout_finds_the_installed_library(checkout: Path, installed: Path) -> None:
    done = python(LOAD, checkout, installed)
    assert done.returncode == 0, done.stderr
    package, library, absence = json.loads(done.stdout)
    assert package == str(checkout / "palette" / "__init__.py")
    assert library == str(installed / "palette" / "_ops_cpu.so")
    assert absence == ""
    assert "Warning" not in done.stderr


@needs_compiled
def test_library_of_other_sources_is_refused_in_one_line(tmp_path: Path, installed: Path) -> None:
    changed = copy_sources(tmp_path)
    with (changed / "csrc" / "ops.cpp").open("a", encoding="utf-8") as file:
        file.write("// edited\n")
    done = python(LOAD, changed, installed)
    assert done.returncode == 0, done.stderr
    _, library, absence = json.loads(done.stdout)
    assert library == "None"
    assert "was built from other sources" in absence
    assert "pip install ." in absence
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1
    assert "built from other sources" in warned[0]


def test_nothing_compiled_warns_once_and_says_what_to_do(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "palette").mkdir()
    hide = f"import sys; sys.path[:] = [p for p in sys.path if p not in {[*map(str, _sites())]}]\n"
    allow = f"sys.path.append({str(_torch_site())!r})\n"
    only_torch = "import torch\nsys.path.pop()\n" if _torch_site() in _sites() else "import torch\n"
    done = python(hide + allow + only_torch + LOAD, checkout, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[1] == "None"
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1
    assert "Install a C++ compiler" in warned[0]


def _sites() -> list[Path]:
    return [place.parent for place in COMPILED]


def _torch_site() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent.parent


def test_kernels_are_a_namespace_in_a_checkout(checkout: Path) -> None:
    (checkout / "kernels").mkdir(exist_ok=True)
    (checkout / "kernels" / "new_op.py").write_text("answer = 42\n", encoding="utf-8")
    code = "import sys, palette.kernels.new_op as op; print(op.answer, 'torch' in sys.modules)"
    done = python(code, checkout)
    (checkout / "kernels" / "new_op.py").unlink()
    assert done.stdout.split() == ["42", "False"], done.stderr


def test_kernels_folder_hides_no_package_of_that_name(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'somebody else'\n", encoding="utf-8")
    done = python("import kernels; print(kernels.name)", checkout, tmp_path)
    assert done.stdout.strip() == "somebody else", done.stderr


@needs_compiled
def test_cpu_library_asks_for_nothing_of_cuda() -> None:
    names = (COMPILED[0] / "_ops_cpu.so").read_bytes()
    assert b"aoti_torch_get_current_cuda_stream" not in names
    assert b"libtorch_cuda" not in names


CUDA_LIBRARY = [place / "_ops_cuda.so" for place in COMPILED if (place / "_ops_cuda.so").is_file()]


@pytest.mark.skipif(
    not CUDA_LIBRARY or shutil.which("c++") is None, reason="no CUDA library was compiled here"
)
def test_cuda_library_needs_only_the_stream_of_cuda_torch(tmp_path: Path) -> None:
    source = tmp_path / "stand_in.cpp"
    source.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n',
        encoding="utf-8",
    )
    stand_in = tmp_path / "libtorch_cuda.so"
    soname = "-Wl,-soname,libtorch_cuda.so"
    subprocess.run(["c++", "-shared", "-fPIC", soname, source, "-o", stand_in], check=True)
    code = (
        "import ctypes, palette.ops, torch\n"
        f"if not torch.cuda.is_available(): ctypes.CDLL({str(stand_in)!r})\n"
        f"ctypes.CDLL({str(CUDA_LIBRARY[0])!r})\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('palette::noise', 'CUDA'))\n"
    )
    done = python(code, ROOT)
    assert done.stdout.strip() == "True", done.stderr


def build(hook: str, checkout: Path, output: Path) -> Path:
    """Call one hook of the build backend as an installer does, without compiling."""
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"import build_backend as b; print(b.{hook}({str(output)!r}))"],
        cwd=checkout,
        env={**os.environ, "PALETTE_NO_EXT": "1", "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return output / done.stdout.split()[-1]


def test_wheel_holds_the_package_and_the_kernels_and_nothing_else(
    checkout: Path, tmp_path: Path
) -> None:
    ghost = checkout / "build" / "lib" / "palette" / "deleted_long_ago.py"
    ghost.parent.mkdir(parents=True)
    ghost.write_text("", encoding="utf-8")
    wheel = build("build_wheel", checkout, tmp_path / "wheels")
    assert wheel.name.startswith("palette_diffusion-")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "palette").rglob("*.py")}
    modules |= {f"palette/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == modules | {"palette/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "palette = palette.cli:main" in archive.read(entry_points).decode()


def test_sdist_holds_everything_a_build_needs(checkout: Path, tmp_path: Path) -> None:
    sdist = build("build_sdist", checkout, tmp_path / "sdists")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "build_backend.py", "pyproject.toml", "constraints.txt", "LICENSE"}
    for folder in ("palette", "kernels", "csrc", "tests"):
        files = [file for file in (checkout / folder).rglob("*.*") if file.is_file()]
        needed |= {
            file.relative_to(checkout).as_posix()
            for file in files
            if file.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
        }
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.fixture
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_backend_uses_the_torch_that_is_there(backend: ModuleType) -> None:
    found = backend.find_torch()
    assert found is not None
    assert (found.root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file()
    assert backend._torch_requirement() == []


def test_backend_asks_for_the_tested_torch_where_there_is_none(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "torch"
    old.mkdir()
    (old / "__init__.py").write_text("", encoding="utf-8")
    (old / "version.py").write_text("__version__ = '2.9.1+cu128'\n", encoding="utf-8")
    monkeypatch.setattr(backend, "_site_packages", lambda: iter([str(tmp_path)]))
    monkeypatch.delenv("PALETTE_NO_EXT", raising=False)
    (requirement,) = backend._torch_requirement()
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", requirement)
    (old / "version.py").write_text("__version__ = '2.15.0'\n", encoding="utf-8")
    assert backend.find_torch().version == "2.15.0"
    assert backend._torch_requirement() == []


def test_backend_finds_the_environment_behind_an_isolated_one(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert any(place.startswith(str(tmp_path)) for place in backend._site_packages())
