# Every target sets up .venv by itself; the second call reuses it.
#   make quickstart ARGS=--fast          options of the quickstart
#   make test PYTHON=/path/to/python     the Python to build .venv with

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## create or update .venv
	@tools/setup_venv.sh

quickstart: setup ## train a teacher, a plain and a LET student on this machine (ARGS=--fast: a short smoke)
	@.venv/bin/python examples/quickstart/run.py $(ARGS)

test: setup ## the tests that are neither slow nor for a GPU
	@.venv/bin/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: setup ## the slow tests too
	@.venv/bin/python -m pytest -m "not gpu" $(ARGS)

lint: setup ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
