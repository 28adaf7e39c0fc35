"""Faults put into the kernels, one at a time: the tests of the op must fail for each.

    python tests/mutations.py            # all of them, some fifteen minutes; part of `make soak`
    python tests/mutations.py triton     # those whose name holds the word
    python tests/mutations.py --list

Works in a copy of the repository. C++ is compiled again for each fault, Triton runs in its
interpreter, CUDA through tests/cuda/emulate.h. Ends with exit code 1 where a fault survives, where
its place in the sources is gone, or where the tests fail without any fault.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """One wrong line."""

    name: str
    file: str
    old: str  # occurs once in the file
    new: str

    @property
    def backend(self) -> str:
        return {"cpu": "cpp", "cuda": "cuda", "kernels": "triton"}[Path(self.file).parent.name]

    @property
    def op(self) -> str:
        stem = Path(self.file).stem.removesuffix("_loops").removesuffix("_backward")
        return {"_group_norm": "group_norm_silu", "philox": "noise"}.get(stem, stem)

    def __str__(self) -> str:
        return f"{self.backend} {self.op}: {self.name}"


NORM, ATTENTION = "csrc/cpu/group_norm_silu", "csrc/cpu/attention"
NOISE, STEP = "csrc/cpu/noise", "csrc/cpu/reverse_step"
DROPOUT, ADAMW = "csrc/cpu/dropout", "csrc/cpu/adamw"

FAULTS = [
    # group_norm_silu in C++
    Fault("eps dropped", NORM + ".cpp", "std::sqrt(variance + eps)", "std::sqrt(variance)"),
    Fault("variance of a sample, not of the group", NORM + ".cpp", "total.m2 / size", "total.m2 / (size - 1.0)"),
    Fault("scale and shift swapped", NORM + ".h", "film = values<double>(scale);\n", "film = values<double>(shift);\n"),
    Fault("1 + scale without the 1", NORM + ".h", "value += 1.0;", "value += 0.0;"),
    Fault("last row not written", NORM + "_loops.h", "row < rows; ++row) {\n    V values[kVectors];\n    if constexpr (kStream)", "row + 1 < rows; ++row) {\n    V values[kVectors];\n    if constexpr (kStream)"),
    Fault("wrong group at the seam", NORM + "_loops.h", "fold(mean + g * channels,", "fold(mean + g * channels - (g > 0),"),
    Fault("variance from unshifted sums", NORM + "_loops.h", "center / static_cast<Wide<T>>(few)", "V{}"),
    Fault("an outlier in the shift", NORM + "_loops.h", "median(totals[0][v], totals[1][v], totals[2][v])", "totals[0][v]"),
    Fault("offset without the exponent's factor", NORM + ".cpp", "unit * (offset[c] + gain[c] * rest)", "offset[c] + gain[c] * rest"),
    Fault("exponent of a number too large for it", NORM + ".cpp", "large ? Silu::of_z : ", ""),
    Fault("last columns of a run not counted", NORM + "_loops.h", "result.mean += step * static_cast<double>(rest) / n;", ""),
    Fault("pairs of a far mean not summed again", NORM + "_loops.h", "exact &= all.mean * all.mean * size <= kFarMean * all.m2;", ""),
    Fault("last odd row of pairs not counted", NORM + "_loops.h", "some - even, sum + c / 2", "0, sum + c / 2"),
    Fault("gradient without the mean over the group", NORM + "_backward.cpp", "-rstd * (mean / size)", "0.0"),
    Fault("gradient without the correlation with x", NORM + "_backward.cpp", "-rstd * rstd * rstd * (mean_d / size)", "0.0"),
    Fault("weight's gradient of the last sample only", NORM + "_backward.cpp", "result.weight[c] += ", "result.weight[c] = "),
    Fault("scale's gradient without the bias", NORM + "_backward.cpp", " + parameters.bias[c] * dz;", ";"),
    Fault("derivative of SiLU without its second term", NORM + "_backward_loops.h", "grad * (gate * fma(z, 1.0f - gate, broadcast(Wide<T>(1))))", "grad * gate"),
    # adamw in C++
    Fault("limit ignored", ADAMW + ".cpp", "limit > 0.0 ?", "limit < 0.0 ?"),
    Fault("moments not corrected for their start", ADAMW + ".cpp", "lr / first", "lr"),
    Fault("average of the old weights", ADAMW + "_loops.h", "average[i] += take * (weight[i] - average[i])", "average[i] -= take * average[i]"),
    Fault("last elements not rounded to the copy", ADAMW + "_loops.h", "store_part(to + at, count - at, load_part(from + at, count - at))", "(void)to"),
    # attention in C++
    Fault("wrong head order", ATTENTION + ".h", "legacy ? head * 3 + part : part * heads + head", "legacy ? part * heads + head : head * 3 + part"),
    Fault("log-sum-exp without the sum", ATTENTION + "_loops.h", "(at.maximum[i] + std::log2(at.sum[i]))", "at.maximum[i]"),
    Fault("scores over D instead of its root", ATTENTION + "_loops.h", "kLog2e / std::sqrt(static_cast<A>(sizes.dims))", "kLog2e / static_cast<A>(sizes.dims)"),
    Fault("earlier keys keep an old maximum", ATTENTION + "_loops.h", "if (key > 0 && factor != A(1))", "if (false)"),
    Fault("last key left out", ATTENTION + "_loops.h", "multiply<A, false>(whole, width, keys, plain(at.scores)", "multiply<A, false>(whole, width, keys - 1, plain(at.scores)"),
    Fault("padding keys take part", ATTENTION + "_loops.h", "scores[j] = kLowest;", "scores[j] = A(0);"),
    Fault("gradient of the scores without delta", ATTENTION + "_backward_loops.h", "(load(slopes + j) - delta)", "load(slopes + j)"),
    Fault("dk of the last queries only", ATTENTION + "_backward_loops.h", "accumulate(row == 0, wide, width, rows, transposed(at.slopes)", "accumulate(true, wide, width, rows, transposed(at.slopes)"),
    Fault("dq of the last keys only", ATTENTION + "_backward_loops.h", "accumulate<A>(key == 0,", "accumulate<A>(true,"),
    # noise in C++
    Fault("stream ignored", "csrc/cpu/philox.h", "c2 = s.stream - Longs{}", "c2 = Longs{}"),
    Fault("layer ignored", "csrc/cpu/philox.h", "c3 = s.layer - Longs{}", "c3 = Longs{}"),
    Fault("upper half of the seed ignored", "csrc/cpu/philox.h", "static_cast<uint32_t>(s.seed >> 32)", "0"),
    Fault("nine rounds", "csrc/cpu/philox.h", "round < 10", "round < 9"),
    Fault("sine and cosine exchanged", NOISE + "_loops.h", "swap ? sine : cosine;", "swap ? cosine : sine;"),
    Fault("step of the next sample", NOISE + ".cpp", "step_of[image * step_stride]", "step_of[(image + 1) % images * step_stride]"),
    Fault("end of an image not written", NOISE + ".cpp", "std::copy_n(last, elements - first, place);", ""),
    # dropout in C++
    Fault("one word more dropped", DROPOUT + "_loops.h", "words >= drop.first ? scaled", "words > drop.first ? scaled"),
    Fault("scale forgotten", DROPOUT + "_loops.h", " * static_cast<float>(drop.scale);", ";"),
    Fault("counters of the wrong pixels", DROPOUT + "_loops.h", "++quad, even += uint64_t{1}", "++quad"),
    Fault("end of a run not written", DROPOUT + "_loops.h", "if (left > kLanes) {", "if (false) {"),
    Fault("bfloat16's smallest numbers lost", DROPOUT + "_loops.h", "#ifdef PALETTE_BF16", "#if 0"),
    Fault("seed of the first sample", DROPOUT + ".cpp", "keys.const_data_ptr<int64_t>()[n]", "keys.const_data_ptr<int64_t>()[0]"),
    Fault("runs begin at the first counter", DROPOUT + ".cpp", "static_cast<uint32_t>(first / 4)", "0"),
    Fault("odd numbers of pixels taken for quads", DROPOUT + ".cpp", "!rows || pixels_of(x) % 4 == 0", "true"),
    # reverse_step in C++
    Fault("off-by-one step of the noise", STEP + ".cpp", "static_cast<uint32_t>(steps[n] + 1)", "static_cast<uint32_t>(steps[n])"),
    Fault("everybody's step is the first one's", STEP + ".cpp", "data[step.dim() == 0 ? 0 : n * step.stride(0)]", "data[0]"),
    Fault("noise of the wrong element", STEP + ".cpp", "return buffer + skipped;", "return buffer;"),
    Fault("slot not written", STEP + ".cpp", "if (slot) write_run", "if (false) write_run"),
    Fault("third channel of the slot left out", STEP + "_loops.h", "(channel < 3 ? 1u : 0u)", "(channel < 2 ? 1u : 0u)"),
    Fault("every operand of the first sample", STEP + ".cpp", "strides[4 - d] = size == 1 && shape.size(4 - d) != 1 ? 0", "strides[4 - d] = size == 1 || d == 4 ? 0"),
    Fault("x0 not clamped from above", STEP + "_loops.h", "x0 = x0 > 1.0f ? broadcast(1.0f) : x0;", ""),
    Fault("clamp that hides NaN", STEP + "_loops.h", "x0 = x0 < -1.0f ? broadcast(-1.0f) : x0;", "x0 = x0 >= -1.0f ? x0 : broadcast(-1.0f);"),
    Fault("c1 and c2 swapped", STEP + "_loops.h", "row.c1 * x0 + row.c2 * before", "row.c2 * x0 + row.c1 * before"),
    Fault("mask turned round", STEP + "_loops.h", "* (1.0f - mask) + mask * y", "* mask + (1.0f - mask) * y"),
    Fault("history holds y instead of x0", STEP + "_loops.h", "put<kPart>(run.history + at, count, x0);", "put<kPart>(run.history + at, count, y);"),
    Fault("a product not rounded", STEP + "_loops.h", "row.a * before + row.b * output;", "fma(broadcast(row.a), before, row.b * output);"),
    # Triton
    Fault("eps dropped", "kernels/group_norm_silu.py", "tl.sqrt_rn(spread / total + eps)", "tl.sqrt_rn(spread / total)"),
    Fault("last position not written", "kernels/group_norm_silu.py", "z.to(y.dtype.element_ty), mask=mask", "z.to(y.dtype.element_ty), mask=mask & (position < spatial - 1)"),
    Fault("last slab counted as a whole one", "kernels/group_norm_silu.py", "last = spatial - (slabs - 1) * length", "last = length"),
    Fault("1 + scale without the 1", "kernels/_group_norm.py", "film = 1.0 + read(", "film = read("),
    Fault("shift dropped", "kernels/_group_norm.py", "offset + read(shift, sample, channel, shift_stride, mask, 0.0)", "offset"),
    Fault("32-bit sample offsets", "kernels/_group_norm.py", "(program // columns // slabs).to(tl.int64)", "(program // columns // slabs)"),
    Fault("gradient without the mean over the group", "kernels/group_norm_silu_backward.py", "- deviation * tilt - level", "- deviation * tilt"),
    Fault("wrong head order", "kernels/attention.py", 'if order == "legacy"', 'if order == "new"'),
    Fault("log-sum-exp without the sum", "kernels/attention.py", "(highest + tl.log2(total)) / LOG2_E", "highest / LOG2_E"),
    Fault("earlier keys keep an old maximum", "kernels/attention.py", "mixed * shrink[:, None] + product", "mixed + product"),
    Fault("gradient of the scores without delta", "kernels/attention.py", "(through - delta[:, None])", "through"),
    Fault("stream ignored", "kernels/noise.py", "stream.to(tl.uint32) + zero", "zero"),
    Fault("upper half of the seed ignored", "kernels/noise.py", "k1 = (seed >> 32).to(tl.uint32) + zero", "k1 = zero"),
    Fault("off-by-one step of the noise", "kernels/reverse_step.py", "quad, now + 1,", "quad, now,"),
    Fault("mask turned round", "kernels/reverse_step.py", "rounded(outside * (1.0 - hole), zero) + rounded(hole * y, zero)", "rounded(outside * hole, zero) + rounded((1.0 - hole) * y, zero)"),
    Fault("layer ignored", "kernels/dropout.py", ".to(tl.uint32) + zero\n    return", ".to(tl.uint32) * zero\n    return"),
    Fault("pixels exchanged", "kernels/dropout.py", "at + channels, w1", "at + channels, w2"),
    # CUDA
    Fault("eps dropped", "csrc/cuda/group_norm_silu.cu", "own.count + problem.eps)", "own.count)"),
    Fault("wrong head order", "csrc/cuda/attention.cu", "is_legacy(order)", "!is_legacy(order)"),
    Fault("one word more dropped", "csrc/cuda/dropout.cu", "words.w[j] >= drop.first", "words.w[j] > drop.first"),
    Fault("channels of the wrong counters", "csrc/cuda/dropout.cu", "(channel + v) * plane + quad", "(channel + v) * plane"),
    Fault("step of the first sample", "csrc/cuda/noise.cu", "step[image * step_stride]", "step[0 * image * step_stride]"),
    Fault("off-by-one step of the noise", "csrc/cuda/reverse_step.cu", "static_cast<uint32_t>(step + 1)", "static_cast<uint32_t>(step)"),
]  # fmt: skip


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {**os.environ, "PYTHONPATH": str(folder), "CUDA_HOME": "/none", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**base, **environment},
        capture_output=True,
        text=True,
    )


def build(folder: Path) -> None:
    built = run(folder, "setup.py", "--quiet", "build_ext", "--inplace")
    if built.returncode != 0:
        raise SystemExit(f"the sources do not compile:\n{built.stdout[-4000:]}")


def tests(folder: Path, backend: str, op: str) -> subprocess.CompletedProcess[str]:
    """The op's tests on one backend, up to the first that fails."""
    pytest = ("-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", "--no-header")
    file = f"tests/ops/test_{op}.py"
    if backend == "cuda":
        return run(folder, *pytest, "tests/cuda/test_emulated.py", "-k", op)
    if backend == "triton":
        return run(folder, *pytest, file, "-k", "triton-on-cpu", TRITON_INTERPRET="1")
    return run(folder, *pytest, file, "-k", "cpp-on-cpu")


def killer(ran: subprocess.CompletedProcess[str]) -> str:
    """The test that failed, without its file; a crash counts too."""
    found = re.findall(r"FAILED \S+?::(\S+)", ran.stdout)
    inner = [each for each in found if "test_tests_of_every_backend" not in each]
    if inner or found:
        return (inner or found)[0]
    return f"exit code {ran.returncode}"


def survives(fault: Fault, folder: Path) -> tuple[bool, str]:
    """Whether the tests pass in spite of the fault, and what killed it."""
    file = folder / fault.file
    text = file.read_text()
    if text.count(fault.old) != 1:
        return True, f"its place occurs {text.count(fault.old)} times in {fault.file}"
    file.write_text(text.replace(fault.old, fault.new))
    try:
        if fault.backend == "cpp":
            build(folder)
        ran = tests(folder, fault.backend, fault.op)
    finally:
        file.write_text(text)
    if ran.returncode == 0:
        return True, "every test passed"
    # interrupted, pytest's own errors, nothing collected; or what the tests need does not compile
    if ran.returncode in (2, 3, 4, 5) or (ran.returncode == 1 and "FAILED " not in ran.stdout):
        return True, f"the tests did not run: {ran.stdout[-300:]}{ran.stderr[-300:]}"
    return False, killer(ran)


def copy_to(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def main() -> int:
    words = [each for each in sys.argv[1:] if each != "--list"]
    chosen = [fault for fault in FAULTS if all(word in str(fault) for word in words)]
    if "--list" in sys.argv[1:]:
        print("\n".join(map(str, chosen)))
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        if any(fault.backend == "cpp" for fault in chosen):
            build(folder)
        # The suite proves all of it; here one op of each backend shows that the copy is whole.
        for backend, op in sorted({(fault.backend, "noise") for fault in chosen}):
            ran = tests(folder, backend, op)
            if ran.returncode != 0:
                print(f"{backend} {op}: the tests fail without any fault: {killer(ran)}")
                return 1
        print("| backend | op | fault | killed by |\n|---|---|---|---|", flush=True)
        for fault in chosen:
            start = time.monotonic()
            alive, reason = survives(fault, folder)
            verdict = f"**survived**: {reason}" if alive else f"`{reason}`"
            print(f"| {fault.backend} | {fault.op} | {fault.name} | {verdict} |", flush=True)
            print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            survivors += [fault] if alive else []
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} faults killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
