# Two commands are all a newcomer needs: `make demo` and `make test`.
# Both need python3 (3.11 or newer) and make, build .venv on the first call and reuse it after.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Marks a finished environment; it is rebuilt when the pins or the dependencies change.
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help env demo test lint types unit slow clean

help:
	@echo "make demo   the whole way on example images, report in runs/demo"
	@echo "make test   style, types and tests"
	@echo "make slow   the longer tests"
	@echo "make env    only build .venv"
	@echo "make clean  remove .venv"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Install Python's venv module first (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/dino-adapters start --out runs/demo --overwrite

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

# One thread a process: two thread pools on two cores wait for each other more than they compute.
unit: $(STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

slow: $(STAMP)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -q

clean:
	rm -rf $(VENV)
