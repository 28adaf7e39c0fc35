#!/usr/bin/env bash
# For a machine with a GPU: build for it, test, look for memory errors, measure. Everything said goes
# to one folder, benchmarks/results/DATE-GPU (or the one named as the first argument).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
results=${1:-benchmarks/results/$(date +%F)-$gpu}
mkdir -p "$results"
failed=()

# keep NAME COMMAND...: run a command, keep what it says, go on if it fails.
keep() {
  echo "== $1"
  "${@:2}" 2>&1 | tee "$results/$1.txt" || failed+=("$1")
}

# one process has the GPU, also where pytest-xdist is missing
serial=(-o addopts=--import-mode=importlib -m 'not soak')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-native} PALETTE_REQUIRE=cpp,cuda
keep build "$python" -m pip install -v --no-build-isolation --no-deps -e .
keep info "$python" -m palette info
keep tests "$python" -m pytest "${serial[@]}" tests/ops tests/diffusion/test_steps.py
if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    keep "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest "${serial[@]}" tests/ops/test_{attention,group_norm_silu,noise,reverse_step}.py \
      -k "cuda and not opcheck and not 2_to_the_31" -x
  done
else
  echo 'no compute-sanitizer on this machine' | tee "$results/memcheck.txt"
fi
keep benchmarks "$python" -m pytest "${serial[@]}" benchmarks --benchmark-json "$results/benchmarks.json"

echo "results: $results"
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
