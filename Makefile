# `make demo` and `make test` each do everything from a bare clone: make .venv, install under constraints.txt, run.
PYTHON ?= python3
BIN := .venv/bin
# Test files at a time. Those with Ray wait more than they compute.
PARALLEL ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo check test test-cluster test-nightly bench docs clean

demo: .venv/.demo
	$(BIN)/python experiments/quickstart.py

# ruff, pyright and the unit tests: about two minutes.
check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/unit -m "not slow and not nightly" -n 2 --dist loadfile

# Everything: check, the slow unit tests, a browser, two and four processes, real local Ray runs.
test: check
	$(BIN)/python -m pytest tests/unit -m "slow and not nightly" -n $(PARALLEL) --dist loadfile
	$(BIN)/python -m pytest tests/browser tests/dist tests/ray -m "not nightly" -n $(PARALLEL) --dist loadfile \
	    --durations 10

# What clouds do: nodes that come, go and are drained, a head that is lost, an autoscaler; real clusters of several
# nodes.
test-cluster: .venv/.dev
	$(BIN)/python -m pytest tests/cluster -m "not nightly" -n $(PARALLEL) --dist loadfile --durations 10

# What takes long and rarely breaks: elastic runs, a lost head, twenty drains, the scripts of experiments/.
test-nightly: .venv/.dev
	$(BIN)/python -m pytest tests -m nightly -n $(PARALLEL) --dist loadfile --durations 10

# Our training step beside sentence-transformers' and a plain loop's, and its parts alone: under ten minutes.
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
