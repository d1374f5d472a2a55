# Two commands: `make demo` and `make test`. Both set themselves up in .venv; nothing else is needed but Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: setup setup-test demo test lint types imports test-faults test-browser clean

setup: .setup-demo
setup-test: .setup-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.setup-demo: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) --editable ".[server]"
	touch $@

.setup-test: .setup-demo
	$(INSTALL) --editable ".[test]"
	touch $@

demo: setup
	$(BIN)/umbel simulate

lint: setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup-test
	$(BIN)/mypy

imports: setup-test
	$(BIN)/lint-imports

test: lint types imports
	$(BIN)/python -m pytest -n 2 -m "not faults and not browser"

test-faults: setup-test
	$(BIN)/python -m pytest -m faults

test-browser: setup-test
	$(BIN)/python -m pytest -m browser

clean:
	rm -rf $(VENV) .setup-demo .setup-test .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
