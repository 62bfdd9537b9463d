# Two commands for a user: `make demo`, `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := -m pytest

.PHONY: demo test test-fast test-gpu test-oldest soak lint format clean

demo: $(READY)
	$(BIN)/doccls demo demo

# Three processes on two cores: one of them, with the suite that comes first (Slurm's), mostly waits.
XDIST := -n 3 --no-loadscope-reorder

test: $(READY)
	$(BIN)/python $(PYTEST) $(XDIST)

# What finds most mistakes within a minute: no process tests, no slow ones, few examples.
test-fast: lint
	DOCCLS_HYPOTHESIS=fast $(BIN)/python $(PYTEST) -n 2 --no-loadscope-reorder -m "not slow" tests/golden tests/unit

# On the machine's GPUs, about four minutes on one; skipped with a notice where there is none.
test-gpu: $(READY)
	$(BIN)/python $(PYTEST) tests/gpu

# All suites with the oldest versions of the dependencies that pyproject.toml allows, in an environment of their own.
OLDEST := .venv-oldest

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python $(PYTEST) $(XDIST)

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable '.[dev]'
	touch $(OLDEST)/.ready

# About 30 minutes on two cores: every fault at every place, 200 kills and 150 stops at random moments, and many drawn examples.
soak: $(READY)
	$(BIN)/python tests/faults/fault_table.py
	$(BIN)/python tests/faults/fault_table.py --processes 2
	$(BIN)/python tests/faults/file_system_table.py
	DOCCLS_TEST_KILLS=50 DOCCLS_TEST_RESUMED_STOPS=50 $(BIN)/python $(PYTEST) tests/distributed/test_resumed_runs.py
	DOCCLS_TEST_STOPS=50 $(BIN)/python $(PYTEST) tests/distributed/test_signals_to_runs.py -k random
	DOCCLS_HYPOTHESIS=soak $(BIN)/python $(PYTEST) --timeout 1200 tests/unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("doccls needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) $(OLDEST) demo
