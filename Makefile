# `make demo` and `make test` each work on a fresh clone, alone: they need Python 3.11 or newer, and a network or pip
# mirror for the packages of constraints.txt. Everything is installed into .venv, nothing outside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What an installation is made from; sources in Python are used in place.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard src/expertshare/native/csrc/*)

MODEL := models/reference
DISTILLED := models/reference-distilled
DISTILLED_FOR := block-top-p:top_p_experts=0.52,group_limit=ignore
PROMPT := Tom has 12 apples. He finds 7 more. He sells 4. How many apples does Tom have now?
POLICIES := vanilla,des-seq,des-vote,block-top-p

.DELETE_ON_ERROR:
.PHONY: help install demo test quality bench figures report docs clean

help:
	@echo 'make demo   generate with the reference model, with and without expert sharing, and draw what was saved'
	@echo 'make install  only set everything up, with what serve and tune need'
	@echo 'make test   lint, types, import contracts, tests'
	@echo 'make quality  accuracy and experts of every policy, the figures of README; a quarter of an hour'
	@echo 'make bench  a few minutes of benchmarks on this machine, into build/bench/ (docs/performance.md)'
	@echo 'make figures  write the figures of README and docs again, from the results in the repository'
	@echo 'make report  a page of the results in the repository, build/report/report.html (docs/report.md)'
	@echo 'make docs   the documentation site, into build/site/'
	@echo 'make clean  remove build products and caches (rm -r $(VENV) for the environment)'

# The model and all inputs are in the repository; nothing is asked of a hub.
demo test quality bench: export HF_HUB_OFFLINE = 1

demo: $(VENV)/runtime.stamp
	@mkdir -p build
	$(BIN)/expertshare generate $(MODEL) --prompt '$(PROMPT)' --policy vanilla
	$(BIN)/expertshare generate $(MODEL) --prompt '$(PROMPT)' --policy des-vote
	$(BIN)/expertshare generate $(DISTILLED) --prompt '$(PROMPT)' --policy '$(DISTILLED_FOR)'
	$(BIN)/expertshare compare $(MODEL) --prompts examples/prompts.jsonl --policies $(POLICIES) --plot build/demo.png
	@echo 'Accuracy against experts, as a picture: build/demo.png'

install: $(VENV)/runtime.stamp
	$(PIP_INSTALL) --editable '.[serve,tune]'
	@echo 'Installed. Next: source $(VENV)/bin/activate'

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# Every policy at two or more settings on 500 unseen prompts of each kind: the figures of README.
QUALITY := benchmarks/results/policies.json
TASKS := arith math code code_pro choice
SETTINGS := vanilla,top-k-cap:experts_per_token=6,top-k-cap:experts_per_token=4,skip:skip_share=0.2,skip:skip_share=0.4,$\
	des-seq:experts_per_vote=1,des-seq:experts_per_vote=2,des-vote:budget=16,des-vote:budget=20,des-vote:budget=28,$\
	block-top-p:top_p_experts=0.6,block-top-p:top_p_experts=0.8,block-max:budget=16,block-max:budget=24,$\
	protected-vote:budget=16,protected-vote:budget=20,protected-vote:budget=28
quality: $(VENV)/runtime.stamp
	@mkdir -p build/quality
	for task in $(TASKS); do \
		$(BIN)/expertshare tasks build/quality/$$task.jsonl --task $$task --count 500 --seed 2026 --split test || exit; \
	done
	cat $(TASKS:%=build/quality/%.jsonl) > build/quality/prompts.jsonl
	$(BIN)/expertshare compare $(MODEL) --prompts build/quality/prompts.jsonl --policies '$(SETTINGS)' \
		--batch-size 64 --gen-length 64 --plot docs/images/policies.png --json > $(QUALITY)
	$(BIN)/python benchmarks/accuracy_by_level.py $(MODEL) --count 500 --seed 2026 --out benchmarks/results/levels.json
	$(MAKE) figures

# Small: one layer, three full-width layers with the head, the reference model. Close everything else first.
bench: $(VENV)/runtime.stamp
	@mkdir -p build/bench
	$(BIN)/expertshare bench experts --case llada2.0-mini --unique 16,32,70 \
		--report build/bench/experts.json --plot build/bench/experts.png
	$(BIN)/expertshare bench forward --case llada2.0-mini --layers 3 --policies vanilla,des-vote:budget=16 \
		--report build/bench/forward.json --plot build/bench/forward.png
	$(BIN)/expertshare bench generate $(MODEL) --limit 4 --policies vanilla,des-vote \
		--report build/bench/generate.json --plot build/bench/generate.png

# Every figure of README and docs, from benchmarks/results and claims.toml; nothing is measured.
figures: $(VENV)/runtime.stamp
	$(BIN)/python benchmarks/figures

# Everything that `expertshare report` has a figure for; nothing is measured.
DRAWN := policies p-sweep block-length-8 block-length-16 block-length-24 block-length-32 steps-distribution $\
	weight-against-loss expert-growth forward-mini experts-mini-3 generate-reference tuning
report: $(VENV)/runtime.stamp
	@mkdir -p build
	$(BIN)/expertshare report $(DRAWN:%=benchmarks/results/%.json) --out build/report

# No network: neither to build the site nor to read it.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site
	@echo 'Open build/site/index.html'

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

$(VENV)/docs.stamp: $(INPUTS) | $(BIN)/python
	@echo 'Installing into $(VENV), with what builds the documentation.'
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/runtime.stamp

clean:
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +
