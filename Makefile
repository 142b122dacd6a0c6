# `make demo` and `make test` each do everything from a bare clone: make .venv, install under constraints.txt, run.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo check test clean

demo: .venv/.demo
	$(BIN)/python experiments/quickstart.py

# ruff, pyright and the unit tests: about two minutes.
check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/unit -m "not slow"

# Everything: check, the slow unit tests, a browser, two and four processes, real local Ray runs.
test: check
	$(BIN)/python -m pytest tests/unit -m slow
	$(BIN)/python -m pytest tests/browser tests/dist tests/ray

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[cpu,demo]"
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[cpu,demo,dev]"
	touch $@

clean:
	rm -rf .venv build dist
