"""Compile csrc/ with ninja: the CPU library always, the CUDA library where nvcc is found.

Environment:
    PALETTE_NO_EXT=1              build pure Python
    PALETTE_REQUIRE=cpp,cuda      fail, instead of going on, without these halves
    PALETTE_SANITIZE=address,undefined   sanitizers in the CPU library (``make asan``)
    TORCH_CUDA_ARCH_LIST          CUDA architectures, as in "8.0;9.0+PTX" or "native"
    CXX, CUDA_HOME, MAX_JOBS      compiler, CUDA toolkit, parallel jobs

Says what it leaves out in one line each. Needs nothing of torch but its headers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import OLDEST_TORCH, find_torch  # noqa: E402
from palette._extension import LIBRARIES, fingerprint  # noqa: E402

CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0;8.0+PTX"
TORCH_TARGET = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"

# A file compiled for one instruction set says so in its name, and holds internal-linkage code only:
# an inline function that leaks out of it could be picked by the linker for every processor.
FLAGS_BY_SUFFIX = {
    "_avx2.cpp": "-mavx2 -mfma -mf16c",
    "_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "_sm90a.cu": "-gencode arch=compute_90a,code=sm_90a",
}


def say(line: str) -> None:
    print(f"palette: {line}", file=sys.stderr, flush=True)


def required() -> set[str]:
    """The halves that PALETTE_REQUIRE names."""
    names = set(os.environ.get("PALETTE_REQUIRE", "").replace(" ", "").split(",")) - {""}
    unknown = names - set(LIBRARIES.values())
    if unknown:
        raise SystemExit(
            f"PALETTE_REQUIRE: unknown half '{unknown.pop()}'; say cpp, cuda or cpp,cuda"
        )
    return names


def absent(half: str, reason: str) -> None:
    """Go on without one half, or stop where the user wants it."""
    if half in required():
        raise SystemExit(f"palette: PALETTE_REQUIRE has {half}, but {reason}")
    say(f"building without {half}: {reason}")


def find_compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home:
            return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def first_line(*command: str) -> str:
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return output.strip().splitlines()[0]


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\S+),", output)
    return match[1] if match else "unknown"


def cuda_architectures(nvcc: str) -> list[str]:
    """The -gencode flags: the list asked for, or the part of ours that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked == "native":
        return ["-arch=native"]
    known = subprocess.run(
        [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
    ).stdout.split()
    flags = []
    for entry in re.split(r"[;,\s]+", (asked or CUDA_ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: '{entry}' is not like 8.0, 9.0a or 9.0+PTX")
        number = match[1] + match[2] + match[3]
        if not asked and f"compute_{number}" not in known:
            say(f"this nvcc does not know sm_{number}: left out")
            continue
        if asked or not match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def quoted(text: str) -> str:
    """A string macro's value, as it stands in a ninja command."""
    return shell('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


def shell(word: Path | str) -> str:
    """One word of a command, as it stands in a ninja file."""
    return shlex.quote(str(word)).replace("$", "$$")


class NinjaBuild(build_ext):
    """Writes one build.ninja for all extensions and runs it; keeps those that were built."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda_absence = ""
        self.nvcc = find_nvcc()

    def get_ext_filename(self, fullname: str) -> str:
        half = LIBRARIES.get(fullname.rpartition(".")[2])
        if half is None:
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + ".so"  # loaded by torch: no Python in its name

    def build_extensions(self) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "palette: torch's headers were not found; install torch>=2.11 first, or build "
                "with isolation (without --no-build-isolation), which fetches them"
            )
        self.torch = torch
        self.work = Path(self.build_temp, "ninja").resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        by_name = {extension.name: extension for extension in self.extensions}
        cuda = by_name.get("palette._ops_cuda")
        if cuda is not None and not self.ninja("cuda", [cuda]):
            self.cuda_absence = "nvcc failed to compile csrc/cuda when this was installed"
            absent("cuda", "nvcc failed to compile csrc/cuda (its messages are above)")
            self.extensions.remove(cuda)
        if not self.ninja("cpp", [by_name["palette._ops_cpu"], by_name["palette._build"]]):
            raise SystemExit(
                "palette: compiling csrc failed (the compiler's messages are above); "
                "PALETTE_NO_EXT=1 installs without, on slower ops"
            )

    def ninja(self, name: str, extensions: list[Extension]) -> bool:
        """Build ``extensions``; False where a command failed."""
        lines = self.rules()
        for extension in extensions:
            lines += self.edges(extension)
        file = self.work / f"{name}.ninja"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        command = [find_ninja(), "-C", str(self.work), "-f", str(file), *jobs]
        return subprocess.run(command).returncode == 0

    def rules(self) -> list[str]:
        compiler = find_compiler()
        assert compiler is not None, "extensions are planned only where a compiler was found"
        include = self.torch.root / "include"
        sanitize = os.environ.get("PALETTE_SANITIZE", "")
        extra = (
            f" -O1 -fsanitize={sanitize} -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
            if sanitize
            else ""
        )
        common = (
            f"-std=c++20 -O3 -DTORCH_TARGET_VERSION={TORCH_TARGET} "
            f"-isystem {shell(include)} -I{shell(ROOT / 'csrc')}"
        )
        # Contraction would round a*b+c once here and twice elsewhere: kernels ask for fma by name.
        cxx = f"-fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra{extra}"
        lines = [
            "ninja_required_version = 1.3",
            "rule cxx",
            f"  command = {shlex.join(compiler)} -MMD -MF $out.d {common} {cxx} $flags"
            " -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shlex.join(compiler)} -shared{extra} $in -o $out $flags",
        ]
        if self.nvcc:
            host = f"-ccbin {shlex.quote(compiler[-1])} " if os.environ.get("CXX") else ""
            lines += [
                "rule nvcc",
                f"  command = {shell(self.nvcc)} {host}-MD -MF $out.d {common}"
                " -DUSE_CUDA -DPALETTE_CUDA -Xcompiler -fPIC,-fvisibility=hidden $flags"
                " -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link_cuda",
                f"  command = {shell(self.nvcc)} {host}-shared -Xcompiler -fPIC $in -o $out $flags",
            ]
        return lines

    def edges(self, extension: Extension) -> list[str]:
        """Build lines of one extension: its objects, then its library."""
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        half = LIBRARIES.get(library.stem)
        rule = "nvcc" if half == "cuda" else "cxx"
        sources = [ROOT / source for source in extension.sources]
        if half:
            sources.append(self.fingerprint_source(half))
        flags = self.compile_flags(half)
        lines, objects = [], []
        for source in sources:
            name = f"{half or 'module'}_{source.name}.o"
            special = next((f for s, f in FLAGS_BY_SUFFIX.items() if source.name.endswith(s)), None)
            own = special if rule == "nvcc" and special else f"{flags} {special or ''}"
            lines += [f"build {escaped(name)}: {rule} {escaped(source)}", f"  flags = {own}"]
            objects.append(escaped(name))
        link = "link_cuda" if half == "cuda" else "link"
        lines += [
            f"build {escaped(library)}: {link} {' '.join(objects)}",
            f"  flags = {self.link_flags(half)}",
            f"default {escaped(library)}",
        ]
        return lines

    def compile_flags(self, half: str | None) -> str:
        if half == "cuda":
            assert self.nvcc is not None
            return " ".join(cuda_architectures(self.nvcc))
        if half == "cpp":
            return ""
        import pybind11

        return " ".join(
            [
                f"-I{shell(pybind11.get_include())}",
                f"-I{shell(sysconfig.get_path('include'))}",
                *self.facts(),
            ]
        )

    def facts(self) -> list[str]:
        compiler = find_compiler()
        assert compiler is not None
        built = self.nvcc is not None and not self.cuda_absence
        architectures = cuda_architectures(self.nvcc) if self.nvcc and built else []
        facts = {
            "COMPILER": first_line(*compiler, "--version"),
            "TORCH_VERSION": self.torch.version,
            "TORCH_TARGET": ".".join(map(str, OLDEST_TORCH)),
            "NVCC": nvcc_version(self.nvcc) if self.nvcc and built else "",
            "CUDA_ARCHITECTURES": " ".join(flag.rpartition("=")[2] for flag in architectures),
            "CUDA_ABSENCE": self.cuda_absence or ("" if built else "no nvcc when installed"),
        }
        return [f"-DPALETTE_{name}={quoted(value)}" for name, value in facts.items()]

    def link_flags(self, half: str | None) -> str:
        if half is None:
            return "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
        torch = f"-L{shell(self.torch.root / 'lib')} -ltorch_cpu"
        if half == "cuda":
            # The CPU build of torch has no such library: this one only records its name, so that
            # a CUDA torch's own is found when the library is loaded.
            stub = self.work / "libtorch_cuda.so"
            compiler = find_compiler() or []
            name = ["-Wl,-soname,libtorch_cuda.so", "-o", str(stub)]
            subprocess.run([*compiler, "-shared", *name, "-xc", "/dev/null"], check=True)
            return f"{torch} -L{shell(self.work)} -Xlinker --no-as-needed -ltorch_cuda"
        # Nothing may stay open in the CPU library: neither a kernel that was announced and not
        # written nor a symbol that only a CUDA torch has.
        return torch if sys.platform == "darwin" else f"-Wl,--no-undefined {torch}"

    def fingerprint_source(self, half: str) -> Path:
        """A generated file with the hash of the sources, from which a checkout tells its own."""
        file = self.work / f"fingerprint_{half}.cpp"
        text = (
            'extern "C" __attribute__((visibility("default"), used)) const char '
            f'palette_sources_{half}[] = "palette-sources:{fingerprint(ROOT, half)}";\n'
        )
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
        return file


def escaped(path: Path | str) -> str:
    """A path as it stands on a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found is None:
        try:
            import ninja
        except ImportError:
            raise SystemExit("palette: ninja was not found; pip install ninja") from None
        found = str(Path(ninja.BIN_DIR, "ninja"))
    return found


class FreshBuild(build):
    """Starts from an empty build/lib: what a former build left there would be packed again."""

    def run(self) -> None:
        if Path(self.build_lib).resolve().is_relative_to(ROOT / "build"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def sources(*patterns: str) -> list[str]:
    return [
        str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))
    ]


def plan() -> list[Extension]:
    """What to compile here: nothing without a compiler, the CUDA half only with nvcc."""
    required()
    if os.environ.get("PALETTE_NO_EXT") == "1":
        absent("cpp", "PALETTE_NO_EXT=1 asks for pure Python")
        absent("cuda", "PALETTE_NO_EXT=1 asks for pure Python")
        return []
    if find_compiler() is None:
        absent("cpp", "no C++ compiler was found (c++, g++ or clang++, or the one named by CXX)")
        absent("cuda", "it needs the C++ compiler too")
        return []
    extensions = [
        Extension("palette._build", ["csrc/module.cpp"]),
        Extension("palette._ops_cpu", sources("csrc/ops.cpp", "csrc/cpu/*.cpp")),
    ]
    if find_nvcc() is None:
        absent("cuda", "nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda")
    else:
        cuda = sources("csrc/ops.cpp", "csrc/cuda/*.cu")
        extensions.append(Extension("palette._ops_cuda", cuda))
    return extensions


setup(
    packages=[*find_packages(ROOT, include=["palette", "palette.*"]), "palette.kernels"],
    # kernels/ has no __init__.py: with one, it would hide Hugging Face's package of the same name
    # from every Python that starts in the repository's root.
    package_dir={"palette.kernels": "kernels"},
    ext_modules=plan(),
    cmdclass={"build_ext": NinjaBuild, "build": FreshBuild},
)
