.PHONY: build check lint test soak bench gpu asan clean

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

soak: # what takes minutes: full shapes, thousands of random calls, faults that the tests must see
	$(PYTHON) -m pytest -n0 -m soak
	$(PYTHON) -m pytest -n0 --hypothesis-profile=soak tests/ops/test_fuzz.py tests/test_checkpoint_fuzz.py
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -n0 tests/ops/test_fuzz.py
	$(PYTHON) tests/mutations.py

bench:
	$(PYTHON) -m pytest benchmarks

gpu: # build for the GPU of this machine, test, sanitize, measure: one folder in benchmarks/results
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh

# The package is built into a folder of its own, whose library has the sanitizers in it, and tested
# from there: -m puts the working directory first on the path, which else is that of the sources.
SANITIZE = address,undefined
COMPILED = adamw attention dropout group_norm_silu noise reverse_step fuzz layer_shapes \
	instruction_sets instructions
SANITIZED = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	PYTHONPATH=$(CURDIR)/build/asan $(PYTHON)
asan:
	CUDA_HOME=/none PALETTE_SANITIZE=$(SANITIZE) $(PYTHON) setup.py --quiet build \
		--build-temp build/asan-temp --build-lib build/asan
	cd build/asan && $(SANITIZED) -c "from palette import _extension as e; \
		assert str(e.load()['cpp'].library).startswith('$(CURDIR)/build/asan'), 'not the sanitized library'"
	cd build/asan && $(SANITIZED) -m pytest -n0 \
		$(addprefix $(CURDIR)/tests/ops/test_,$(addsuffix .py,$(COMPILED))) \
		-k "not reference-on-cpu and not sdpa-on-cpu and not wide_registers"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks \
		.hypothesis .import_linter_cache palette/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
