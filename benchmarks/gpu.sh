#!/usr/bin/env bash
# For a machine with a GPU: build for it, test, look for memory errors, measure. Everything said goes
# to one folder, benchmarks/results/DATE-GPU (or the one named as the first argument). The limits in
# seconds add up to ten minutes; what reaches its own is stopped, and its tables so far are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
results=${1:-benchmarks/results/$(date +%F)-$gpu}
mkdir -p "$results"
failed=()

# keep NAME SECONDS COMMAND...: run a command for so long, keep what it says, go on if it fails.
keep() {
  echo "== $1"
  timeout --signal=INT --kill-after=5 "${@:2}" 2>&1 | tee "$results/$1.txt" || failed+=("$1")
}

# one process has the GPU, also where pytest-xdist is missing
serial=(-o addopts=--import-mode=importlib -m 'not soak')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-native} PALETTE_REQUIRE=cpp,cuda
keep build 120 "$python" -m pip install -v --no-build-isolation --no-deps -e .
keep info 20 "$python" -m palette info
keep tests 120 "$python" -m pytest "${serial[@]}" tests/ops tests/diffusion/test_steps.py
# What says most first, and torch.compile, which tunes for minutes, last.
row=benchmarks/bench_sampling.py::test_step
PALETTE_RESULTS=$results/sampling keep sampling 180 "$python" -m pytest "${serial[@]}" \
  benchmarks/bench_sampling.py::test_one_image "$row"[{256-8,128-1,256-1}]
PALETTE_RESULTS=$results/ops keep ops 60 "$python" -m pytest "${serial[@]}" \
  benchmarks/bench_{group_norm_silu,reverse_step,attention,noise,dropout,accelerate}.py
if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    keep "$tool" 25 "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest "${serial[@]}" tests/ops/test_{attention,group_norm_silu,noise,reverse_step}.py \
      -k "cuda and not opcheck and not 2_to_the_31" -x
  done
else
  echo 'no compute-sanitizer on this machine' | tee "$results/memcheck.txt"
fi
echo "results: $results"
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
