# `make demo` and `make test` each work on a fresh clone, alone: they need Python 3.11 or newer, and a network or pip
# mirror for the packages of constraints.txt. Everything is installed into .venv, nothing outside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What an installation is made from; sources in Python are used in place.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard src/expertshare/kernels/native/*)

MODEL := models/reference
PROMPT := Tom has 12 apples. He finds 7 more. He sells 4. How many apples does Tom have now?
POLICIES := vanilla,des-seq,des-vote,block-top-p

.DELETE_ON_ERROR:
.PHONY: help demo test clean

help:
	@echo 'make demo   generate with the reference model, with and without expert sharing, and draw what was saved'
	@echo 'make test   lint, types, import contracts, tests'
	@echo 'make clean  remove build products and caches (rm -r $(VENV) for the environment)'

# The model and all inputs are in the repository; nothing is asked of a hub.
demo test: export HF_HUB_OFFLINE = 1

demo: $(VENV)/runtime.stamp
	@mkdir -p build
	$(BIN)/expertshare generate $(MODEL) --prompt '$(PROMPT)' --policy vanilla
	$(BIN)/expertshare generate $(MODEL) --prompt '$(PROMPT)' --policy des-vote
	$(BIN)/expertshare compare $(MODEL) --prompts examples/prompts.jsonl --policies $(POLICIES) --plot build/demo.png
	@echo 'Accuracy against experts, as a picture: build/demo.png'

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expertshare needs Python 3.11 or newer, got " \
		+ sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime.stamp: $(INPUTS) | $(BIN)/python
	@echo 'Installing into $(VENV); the first time this takes a few minutes.'
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/dev.stamp: $(INPUTS) | $(BIN)/python
	@echo 'Installing into $(VENV), tools for development included; the first time this takes a few minutes.'
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/runtime.stamp

clean:
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +
