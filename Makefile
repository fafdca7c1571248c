# Every target sets up .venv by itself; the second call reuses it.
#   make quickstart ARGS=--fast          options of the quickstart
#   make test PYTHON=/path/to/python     the Python to build .venv with
#   make test CONSTRAINTS=constraints.txt    the versions of a tested set
#   make test VENV=/path/to/environment  another place than .venv

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-oldest test-newest lint
VENV ?= .venv
# Two at a time, a file's tests in one process, which share its pools and fixtures; small files last.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export VENV CONSTRAINTS PYTHON

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## create or update .venv
	@tools/setup_venv.sh

quickstart: setup ## train a teacher, a plain and a LET student on this machine (ARGS=--fast: a short smoke)
	@$(VENV)/bin/python -m megatron_let quickstart $(ARGS)

test: setup ## the tests that are neither slow nor for a GPU
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: setup ## the slow tests too
	@$(PYTEST) -m "not gpu" $(ARGS)

test-oldest: ## the tests with the oldest allowed packages, in .venv-oldest (slow: installs 6 GB)
	@$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/constraints-oldest.txt

test-newest: ## the tests with the newest tested packages, in .venv-newest (slow: installs 6 GB)
	@$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints.txt

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
