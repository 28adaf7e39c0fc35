.PHONY: build

PYTHON ?= python

build:
	$(PYTHON) setup.py --quiet build_ext --inplace
