# `make serve` and `make test` work on a fresh machine; the rest is for developers.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python that is new enough. Another one: make serve PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= 2.13.0
# More options for `turnout serve`, say ARGS="--port 9000"
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
QUANTIZER := .turnout/tools/quantizer

.PHONY: help setup base serve train quantizer loadtest test test-slow test-all test-gpu check format clean

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

setup: $(INSTALLED) ## make .venv with the pinned dependencies

# Stamped, so that it runs again only when the pins have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo "Turnout needs Python 3.11 or later: make PYTHON=…" >&2; exit 1; }
	@[[ -x $(BIN)/python ]] || { echo "Making .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@# Where pip is set up to know a CPU build, that is taken, and no other index is asked.
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "Installing torch $(TORCH) for the GPU here"; \
		$(PIP) torch==$(TORCH); \
	else \
		echo "Installing torch $(TORCH) for the CPU: nvidia-smi sees no GPU"; \
		$(PIP) torch==$(TORCH)+cpu 2>/dev/null || \
			$(PIP) torch==$(TORCH) --extra-index-url https://download.pytorch.org/whl/cpu; \
	fi
	@echo "Installing Turnout and its dependencies, a minute or two"
	@$(PIP) -qq --editable '.[dev]'
	@touch $@

base: $(INSTALLED) ## make the default base, once
	@$(BIN)/python -c 'from server.default_base import ensure_default_base as make; make()'

serve: base ## serve the default base and two example adapters on 127.0.0.1:8000
	@exec $(BIN)/turnout serve --example-adapters $(ARGS)

train: base ## train an adapter on 64 example rows and register it as capital-tags
	@$(BIN)/turnout train --config training/example/train.yaml --out .turnout/trained/capital-tags \
		--overwrite --register capital-tags $(ARGS)

quantizer: $(QUANTIZER)/.installed ## make the environment in which `turnout quantize` runs its libraries

# Over .venv, whose torch and transformers it sees: GPTQModel's numpy is another one than ours.
$(QUANTIZER)/.installed: requirements-quantizer.txt constraints.txt | $(INSTALLED)
	@rm -rf $(QUANTIZER)
	@$(BIN)/python -m venv $(QUANTIZER)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(QUANTIZER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/turnout.pth"
	@echo "Installing the quantizers, half a minute"
	@grep -v '^numpy==' constraints.txt > $(QUANTIZER)/constraints.txt
	@$(QUANTIZER)/bin/python -m pip install --disable-pip-version-check --no-warn-conflicts -qq \
		--constraint $(QUANTIZER)/constraints.txt --requirement requirements-quantizer.txt
	@touch $@

loadtest: base ## load a server of 20 adapters for a minute; .turnout/loadtest/report.html
	@$(BIN)/turnout loadtest demo $(ARGS)

test: base ## run the tests that take seconds
	@$(PYTEST) -m "not slow and not gpu"

test-slow: base ## run the tests that take minutes
	@$(PYTEST) -m "slow and not gpu"

test-all: base ## run every test that needs no GPU
	@$(PYTEST) -m "not gpu"

test-gpu: base ## run the tests that need a GPU
	@$(PYTEST) -m gpu

check: $(INSTALLED) ## format, lint and types: the gate before a commit
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(INSTALLED) ## rewrite what check would complain of, where a tool can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove all that make made; adapters registered in .turnout/store stay
	rm -rf .venv .turnout/base .turnout/trained *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
