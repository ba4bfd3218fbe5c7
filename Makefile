# Two commands do all the set-up: `make sweep` (no torch) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: sweep test scorecard lint types clean

sweep: $(VENV)/.installed
	$(BIN)/synerdiff sweep experiments.yaml

test: $(VENV)/.installed-all
	$(BIN)/python -m pytest

# At every release: predictions beside what others measured (docs/scorecard.md).
scorecard: $(VENV)/.installed
	$(BIN)/synerdiff scorecard --only times --out results/scorecard-times
	$(BIN)/synerdiff scorecard --only mlperf --out results/scorecard-mlperf

lint: $(VENV)/.installed-all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-all
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "synerdiff needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[hardware,cluster,tune,dev]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) results build *.egg-info
