#!/usr/bin/env bash
# For a machine with a GPU: build for it, test, measure, look for memory errors. Everything said goes
# to one folder, benchmarks/results/DATE-GPU (or the one named as the first argument). It takes nine
# minutes at most (PALETTE_SECONDS): what reaches its own limit is stopped, and what it has written
# so far is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
budget=${PALETTE_SECONDS:-540}

# What every step imports, before any of them takes its time.
gpu=$(PYTHONPATH=benchmarks "$python" -c 'import bench_sampling, hypothesis, pytest_benchmark, torch, xdist
print(torch.cuda.get_device_name().replace(" ", "-").lower())')
results=${1:-benchmarks/results/$(date +%F)-$gpu}
mkdir -p "$results"
failed=() unfinished=()

# keep NAME SECONDS COMMAND...: run a command for so long, keep what it says, go on if it fails.
keep() {
  local name=$1 limit=$(($2 < budget - SECONDS ? $2 : budget - SECONDS)) status=0
  echo "== $name (${SECONDS}s)"
  if [ "$limit" -lt 10 ]; then
    unfinished+=("$name")
    return
  fi
  timeout --signal=INT --kill-after=5 "$limit" "${@:3}" 2>&1 | tee "$results/$name.txt" || status=$?
  case $status in
    0) ;;
    124 | 137) unfinished+=("$name") ;;
    *) failed+=("$name") ;;
  esac
}

# one process has the GPU while something is measured
serial=("$python" -m pytest -o addopts=--import-mode=importlib -m 'not soak')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-native} PALETTE_REQUIRE=cpp,cuda
keep build 100 "$python" -m pip install -v --no-build-isolation --no-deps -e .
keep info 10 "$python" -m palette info
keep graphs 45 "${serial[@]}" -n 6 tests/diffusion/test_steps.py tests/ops/test_composability.py \
  -k 'gpu or captured or graphs_of or cuda'
keep tests 100 "$python" benchmarks/proven.py
# What says most first, and torch.compile, which tunes for minutes, last.
row=benchmarks/bench_sampling.py::test_step
PALETTE_RESULTS=$results/sampling keep sampling 115 "${serial[@]}" \
  benchmarks/bench_sampling.py::test_one_image "$row"[{256-8,128-1,256-1}]
PALETTE_RESULTS=$results/ops keep ops 70 "${serial[@]}" \
  benchmarks/bench_{reverse_step,attention,noise,dropout,group_norm_silu,accelerate}.py
if sanitizer=$(command -v compute-sanitizer); then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for each in memcheck:60 racecheck:40 initcheck:30 synccheck:30; do
    tool=${each%:*}
    keep "$tool" "${each#*:}" "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" benchmarks/sanitize.py
  done
else
  echo 'no compute-sanitizer on this machine' | tee "$results/memcheck.txt"
fi
echo "results: $results (${SECONDS}s)"
if [ "${#unfinished[@]}" -gt 0 ]; then
  echo "not finished: ${unfinished[*]}" | tee "$results/unfinished.txt"
fi
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
