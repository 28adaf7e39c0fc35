.PHONY: build check lint test bench gpu asan clean

PYTHON ?= python
CPP = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

build: # compile what changed in csrc/, beside the sources (for an editable install)
	$(PYTHON) setup.py --quiet build_ext --inplace

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP)
	$(PYTHON) -m mypy
	lint-imports --no-logo

test:
	$(PYTHON) -m pytest

check: lint test

bench:
	$(PYTHON) -m pytest benchmarks

gpu: # build for the GPU of this machine, test, sanitize, measure: one folder in benchmarks/results
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh

# The package is built into a folder of its own, whose library has the sanitizers in it.
SANITIZE = address,undefined
asan:
	CUDA_HOME=/none PALETTE_SANITIZE=$(SANITIZE) $(PYTHON) setup.py --quiet build \
		--build-temp build/asan-temp --build-lib build/asan
	PYTHONPATH=$(CURDIR)/build/asan \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(PYTHON) -m pytest -n0 tests/ops

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks \
		.hypothesis .import_linter_cache palette/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
