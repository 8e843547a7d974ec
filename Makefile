# `make demo` and `make test` work from any state; each builds .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

TOOLS := .tools

# Tests start hundreds of processes; where this is set, each compiles every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test fuzz lint k8s-check check clean

install: $(STAMP)

$(STAMP): pyproject.toml deploy/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint deploy/constraints.txt --editable ".[test,dev,bench,sources,serve]"
	touch $@

demo: install
	$(BIN)/python examples/demo.py demo-output

# What tests run beside Python and skip by name where it is not at hand; no server of the machine's is touched.
$(TOOLS)/.fetched:
	mkdir -p $(TOOLS)
	-cd $(TOOLS) && apt-get download --quiet prometheus && dpkg -x prometheus_*.deb .
	touch $@

test: install $(TOOLS)/.fetched
	PATH="$(CURDIR)/$(TOOLS)/usr/bin:$$PATH" $(BIN)/python -m pytest

RUNS ?= 300000

# Coverage-guided, for as long as you like; what it learns stays in .fuzz.
fuzz: install
	$(BIN)/python -m pip install --quiet "atheris>=3.0"
	for target in chunk weights configuration; do \
		PYTHONPATH=deploy $(BIN)/python tests/fuzz.py $$target .fuzz/$$target -runs=$(RUNS) -timeout=10 || exit 1; \
	done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

k8s-check: install
	$(BIN)/python -m pytest tests/test_k8s.py

check: lint test

clean:
	rm -rf $(VENV) $(TOOLS) demo-output .fuzz .pytest_cache .mypy_cache .ruff_cache
