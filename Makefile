# Two commands do everything: `make demo` and `make test`. Both set up .venv from constraints.txt first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?=

.PHONY: demo test ui smollm2 docs lint clean

demo: $(READY)
	HELPSTEER_EXPERIMENT=demo $(BIN)/helpsteer run

test: $(READY)
	$(BIN)/python -m pytest

ui: $(READY)
	$(BIN)/helpsteer ui

# A real 135M-parameter model on your own ratings: make smollm2 DATA=path/to/folder
smollm2: $(READY)
	$(BIN)/python -m helpsteer_assets.prepare_smollm2 $(if $(DATA),--data "$(DATA)")

# The parts of docs/ that are generated from code.
docs: $(READY)
	$(BIN)/python -m helpsteer_assets.reference

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and pinned, so that nothing that follows brings another build of it.
$(READY): setup.py constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev,smollm2]'
	touch $@
