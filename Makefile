# make quickstart   raw text to a trained, exported model, in minutes on 2 cores; TENSOR=, PIPELINE=, DATA= set the layout
# make test         the test suite; WORKERS= sets how many files are tested at once
# make check        lint, format, types, documents and tests, as CI runs them
# make docs         the documentation site, into build/docs; warnings are errors
# make format       formats the code, which make check asks for
# make conformance  transformers' own model tests on every kind of exported model; fetches them from PyPI
# make soak         thousands of steps of every kind of routing; takes long, and is no part of the others
# Each makes .venv and installs what it needs first.

PYTHON ?= python3
TENSOR ?= 2
PIPELINE ?= 1
DATA ?= 1
WORKERS ?= 2

VENV := .venv
CODE := megadyn tools examples tests docs setup.py
ON_CPU := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: quickstart test check soak docs format lint types conformance install clean

install: $(VENV)/installed

# torch goes first and alone: asked for by another package, pip might take another build of it.
$(VENV)/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: install
	$(ON_CPU) TENSOR=$(TENSOR) PIPELINE=$(PIPELINE) DATA=$(DATA) examples/quickstart/run.sh

test: install
	$(ON_CPU) python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

soak: install
	$(ON_CPU) python tools/benchmark.py soak --page benchmarks/soak

docs: install
	DS_ACCELERATOR=cpu $(ON_CPU) python -m sphinx -W --keep-going -q -b html docs build/docs

format: install
	$(VENV)/bin/ruff format $(CODE)

lint: install
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)

types: install
	$(VENV)/bin/mypy

check: lint types docs test

conformance: install
	$(ON_CPU) python -m tests.exports_suite.run

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
