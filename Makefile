PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH_BIN ?= $(BIN)

.PHONY: demo test test-slow test-gpu check bench bench-gpu golden

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)  ## tune the embedded model so that it writes about women as often as about men
	$(BIN)/tiltlm tune examples/parity.yaml --output-dir runs/parity-$$(date +%Y%m%d-%H%M%S)

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

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

golden: $(INSTALLED)  ## write the golden curves anew, after a change that is meant to move them
	OMP_NUM_THREADS=1 $(BIN)/python tests/golden/curves.py
