# `make run` and `make test` are the two to know; each sets up what it needs, and a second call starts at once.
# PYTHON=/path/to/python3.12 uses another interpreter, in an environment of its own (.venv-3.12).

PYTHON ?= $(shell for name in python3.11 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
# The folder's name carries the version only where an interpreter other than 3.11 is asked for.
ifneq ($(filter command line environment,$(origin PYTHON)),)
SUFFIX := $(filter-out -3.11,$(shell $(PYTHON) -c 'import sys; print("-%d.%d" % sys.version_info[:2])'))
endif
VENV ?= .venv$(SUFFIX)
BIN := $(VENV)/bin

PACKAGES := $(patsubst %/__init__.py,%,$(wildcard recipes/__init__.py models/__init__.py pretrain/__init__.py \
	rewards/__init__.py posttrain/__init__.py))
# Two workers, a file to one worker, so that a file's compiled programs and its vLLM engine are made once. In the order
# of their names, which begins with long files and ends with short ones; xdist's own order ends with those of few tests,
# which are the longest.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup run test check test-all soak bench lock format clean

help:  ## Lists the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## Makes the virtual environment; does nothing when it is there.
	@test -n "$(PYTHON)" || { echo "Makefile: PYTHON: no python3.11 (or newer python3) on the path; give PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) .ci/setup_environment.py --venv $(VENV)

run: setup  ## From random weights to an exported model that solves arithmetic stories; what is done is not repeated.
	@$(BIN)/posttrain pipeline quickstart $(ARGS)

test: setup  ## Tests, but for the slow ones, the campaigns and those that need a GPU.
	@$(PYTEST) $(PARALLEL) -m "not slow and not soak and not gpu" $(ARGS)

test-all: setup  ## Tests with the slow ones.
	@$(PYTEST) $(PARALLEL) -m "not soak and not gpu" $(ARGS)

soak: setup  ## The long campaigns.
	@$(PYTEST) -m soak --timeout 0 $(ARGS)

check: setup  ## Format, lint, types and architecture; changes nothing.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES) $(wildcard bench/*.py) .ci/*.py
	@$(PYTEST) -q tests/architecture

format: setup  ## Formats, and mends what the linter can mend.
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup  ## Every module of bench/ that has a main, one after the other.
	@set -e; for file in $$(grep -lE '^if __name__ ==' bench/*.py); do module=bench.$$(basename $$file .py); echo "== $$module"; $(BIN)/python -m $$module; done

lock: setup  ## Pins the requirement files anew from pyproject.toml; ARGS=--upgrade looks for newer versions.
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/python .ci/lock.py --uv $(BIN)/uv $(ARGS)

clean:  ## Removes caches and build outputs, and keeps environments and runs.
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
