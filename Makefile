# Every target sets up what it needs; a second call installs nothing.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# uv reads local wheels (a CPU build of torch, an air-gapped mirror) from where pip is told to look.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-cluster test-gpu check fix

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

check: $(STAMP)  ## lint, format and types; changes nothing
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

fix: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix src tests bench
	$(BIN)/ruff format src tests bench
