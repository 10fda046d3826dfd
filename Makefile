# make plan   a plan for the shipped scenario, from nothing but Python 3.11 and make
# make test   everything CI checks: lint, types, import rules, tests, documentation
# make docs   the documentation, in out/site; warnings are errors
# make studies-check [DATA=DIR]   compute the quick studies again, hold the committed numbers against them
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.PHONY: plan test docs lint types studies-check clean

plan: $(VENV)/.light
	$(BIN)/tierwise plan

test: lint types
	$(BIN)/python -m pytest -n 2

DATA ?= $(firstword $(wildcard shared/data ../shared/data))
studies-check: $(VENV)/.full
	$(BIN)/python studies/index.py --check
	$(BIN)/python studies/check.py $(if $(DATA),--data $(DATA))

docs: $(VENV)/.full
	$(BIN)/python docs/tools/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.full
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("tierwise needs Python >= 3.11; got " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.11." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.light: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/.full: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test,dev]'
	touch $@ $(VENV)/.light

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis out
