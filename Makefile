# `make demo` and `make test` each do everything from a bare clone: make .venv, install under constraints.txt, run.
PYTHON ?= python3
BIN := .venv/bin
# Compiled files are kept, whatever the environment says: each of many processes would else compile torch and Ray anew.
export PYTHONDONTWRITEBYTECODE :=
# Tests at a time where Ray and other processes are started, which wait much of their time.
PARALLEL ?= 2
# Python compiles what it imports; compiling all of it beforehand would take two minutes.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Files in their order: by default those of many tests come first, and the long ones of Ray last and alone.
SPREAD := -n $(PARALLEL) --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: demo check test test-slow test-nightly bench docs clean

demo: .venv/.demo
	$(BIN)/python experiments/quickstart.py

# ruff, pyright and the unit tests; before them those that time a command, for which the machine has to be idle.
check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/unit/test_start_time.py
	@nice $(BIN)/pyright --pythonpath $(BIN)/python & pyright=$$!; \
	$(BIN)/python -m pytest tests/unit --ignore tests/unit/test_start_time.py -m "not slow and not nightly" -n 2 --dist loadfile --durations 10; tests=$$?; \
	wait $$pyright && exit $$tests

# Everything but what is nightly: check, then the slow tests.
test: check test-slow

# The slow unit tests, a browser, two and four processes, real local Ray runs, and clusters of several Ray nodes on this
# machine, which come, go and are drained.
test-slow: .venv/.dev
	$(BIN)/python -m pytest tests -m "slow and not nightly" $(SPREAD)

# What takes long and rarely breaks: autoscaling and elastic runs, a lost head, twenty drains, experiments/.
test-nightly: .venv/.dev
	$(BIN)/python -m pytest tests -m nightly $(SPREAD)

# Our training step beside sentence-transformers' and a plain loop's, and its parts alone: eight minutes on two cores.
bench: .venv/.dev
	$(BIN)/python experiments/benchmarks/train_speed.py --json bench-train.json
	$(BIN)/python experiments/benchmarks/parts.py --json bench-parts.json

# The documentation, as site/index.html.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[cpu,demo]"
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[cpu,demo,dev,docs]"
	touch $@

clean:
	rm -rf .venv build dist site
