# Everything runs in .venv, which launch/venv.sh makes and brings up to date, without root.
#   PYTHON=python3.12 make test    an interpreter of yours, 3.11 or newer
#   make test PINNED=0             the newest versions instead of those in constraints.txt

PINNED ?= 1
# More for the quickstart's command line, as ARGS=--config.seed=1.
ARGS ?=
# For pytest's, as PYTEST_ARGS='-k losses'.
# Heavy tests lie together: a worker that is done takes from the other.
PYTEST_ARGS ?= -n 2 --dist worksteal

export PYTHON PINNED
# Packages of another installation must not be taken for ours.
unexport PYTHONHOME PYTHONPATH

PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format typecheck lock install install-test clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

quickstart: install ## train, calibrate and evaluate on Fashion-MNIST, and write the report
	$(PY) -m sync_jax.main --config=configs/quickstart.py $(ARGS)

test: install-test ## run the whole test suite
	$(PY) -m pytest $(PYTEST_ARGS)

lint: install-test ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: install-test ## mend what can be mended of them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: install-test ## check the types
	$(PY) -m mypy

install: ## bring .venv up to date
	@sh launch/venv.sh

install-test: ## the same, with what the tests need
	@sh launch/venv.sh test

# One file for every Python from 3.11 on: what differs between them carries an environment marker.
lock: install-test ## choose the newest versions anew and write them to constraints.txt
	$(PY) -m pip install -qq uv
	$(PY) -m uv pip compile --no-python-downloads --quiet --upgrade --universal --python-version 3.11 --all-extras \
	  --no-annotate --custom-compile-command 'make lock' --output-file constraints.txt setup.cfg

clean: ## remove .venv and all caches, but no data and no runs
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
