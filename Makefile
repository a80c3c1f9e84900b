# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Marks a finished environment; it is rebuilt when the pins or the dependencies change.
STAMP := $(VENV)/.installed

.PHONY: env demo test lint types unit slow clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: env
	$(BIN)/dino-adapters start --out runs/demo

test: lint types unit

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyright

# One thread a process: two thread pools on two cores wait for each other more than they compute.
unit: env
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -q

slow: env
	$(BIN)/pytest -m slow -q

clean:
	rm -rf $(VENV)
