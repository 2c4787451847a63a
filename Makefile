PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH_BIN ?= $(BIN)
# One process of tests a core, at most eight.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))
PYTEST := $(BIN)/python -m pytest
FAST := not slow and not gpu

.PHONY: help demo check lint types test coverage test-slow test-gpu golden build bench bench-gpu

help:  ## list the targets
	@awk 'match($$0, /^[a-z-]+:.*## /) { printf "%-10s  %s\n", substr($$0, 1, index($$0, ":") - 1), substr($$0, RSTART + RLENGTH) }' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## tune the embedded model so that it writes about women as often as about men
	$(BIN)/tiltlm tune examples/parity.yaml --output-dir runs/parity-$$(date +%Y%m%d-%H%M%S)

check: lint types test  ## what a pull request must pass: format, lint, types, tests

lint: $(INSTALLED)  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)  ## mypy, strict, over the package and the helpers of its tests
	$(BIN)/mypy

test: $(INSTALLED)  ## the tests on all cores (WORKERS=N), then one by one those that need the clock, signals or the disk
	$(PYTEST) $(PYTEST_ARGS) -m "$(FAST) and not serial" --numprocesses $(WORKERS) --dist loadfile
	$(PYTEST) $(PYTEST_ARGS) -m "$(FAST) and serial" || test $$? = 5  # PYTEST_ARGS may leave none of them

coverage: override PYTEST_ARGS += --cov --cov-append --cov-report= --cov-fail-under=0
coverage: forget-coverage test  ## the same tests, and the lines that they miss; fails below the floor in pyproject.toml
	$(BIN)/coverage report

.PHONY: forget-coverage
forget-coverage: $(INSTALLED)
	@$(BIN)/coverage erase

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(PYTEST) -m slow

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

golden: $(INSTALLED)  ## write the golden curves anew, after a change that is meant to move them
	OMP_NUM_THREADS=1 $(BIN)/python tests/golden/curves.py

build: $(INSTALLED)  ## make the source distribution and the wheel in dist/
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

bench: $(INSTALLED)  ## all benchmarks in turn, with TRL, which nothing else needs; BENCH_ARGS=--quick for tiny sizes
	$(BENCH_BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BENCH_BIN)/python benchmarks/sampling.py $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/sampling.py --dtype auto $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/step.py $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/step.py --dtype auto $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/off_policy.py $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/memory.py $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/growth.py $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/roofline.py $(BENCH_ARGS)

bench-gpu: $(INSTALLED)  ## those that take a CUDA device, on it; models as large as there is a point in
	$(BENCH_BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BENCH_BIN)/python benchmarks/sampling.py --device cuda --dtype auto --case embedded:4096 gpt2:512 $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/step.py --device cuda --dtype auto --case embedded:4096 gpt2:512 --trl-rows 64 $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/off_policy.py --device cuda --dtype auto --case embedded:4096 --rows 512 $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/growth.py --device cuda --dtype auto $(BENCH_ARGS)
	$(BENCH_BIN)/python benchmarks/roofline.py --device cuda $(BENCH_ARGS)
