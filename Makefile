# Every target sets up what it needs; a second call installs nothing.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# uv reads local wheels (a CPU build of torch, an air-gapped mirror) from where pip is told to look.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-cluster test-gpu bench bench-gpu check fix

help:  ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dpo-lora needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install --quiet uv; then \
	  $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

setup: $(STAMP)  ## create .venv and install the pinned stack

train: $(STAMP)  ## train an adapter on this machine (add overrides with ARGS='dpo.beta=0.2')
	$(BIN)/dpo-lora train $(ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n 2 -m 'not gpu and not cluster and not slow' $(ARGS)

test-slow: $(STAMP)  ## run the tests of whole sweeps, minutes each
	$(BIN)/python -m pytest -m 'slow and not cluster' $(ARGS)

test-cluster: $(STAMP)  ## run the tests of sweeps through submitit and on a Ray cluster of this machine
	$(BIN)/python -m pip install --quiet uv && $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,ray]'
	$(BIN)/python -m pytest -m cluster $(ARGS)

test-gpu: $(STAMP)  ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

BENCH := $(BIN)/python -W ignore bench/engine.py
bench: $(STAMP)  ## measure the pair engine beside stock TRL; about an hour on two quiet cores
	$(BENCH) --workload short --pairs 8 --rounds 3 --ablations
	$(BENCH) --workload medium --pairs 8 --rounds 3
	$(BENCH) --workload long --pairs 8 --rounds 3
	$(BENCH) --workload chat --pairs 4 --rounds 1
	if [ -d ../shared/data ]; then $(BENCH) --workload polite helpful --pairs 8 --rounds 1; fi
	$(BIN)/python -W ignore bench/curve.py
	$(BIN)/python -W ignore bench/memory.py --workload short medium --growth
	$(BIN)/python bench/table.py

bench-gpu: $(STAMP)  ## the same on a CUDA device: Llama-3.2-1B's shape, bf16, 4 to 64 pairs a step; four minutes on an H200
	$(BIN)/python -W ignore bench/gpu.py $(ARGS)
	$(BIN)/python bench/table.py

CPP := $(wildcard src/dpo_lora/engine/native/*.cpp src/dpo_lora/engine/native/*.h)
check: $(STAMP)  ## lint, format and types; changes nothing
	$(BIN)/ruff check src tests bench docs
	$(BIN)/ruff format --check src tests bench docs
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

fix: $(STAMP)  ## let ruff and clang-format rewrite what they can, and write docs/settings.md anew
	$(BIN)/ruff check --fix src tests bench docs
	$(BIN)/ruff format src tests bench docs
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/python docs/settings.py
