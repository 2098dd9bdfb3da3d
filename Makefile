# arctic_like: everything runs in .venv, which is made once and again when the pins change.

PYTHON ?= python3
JOBS ?= 2
EXTRAS := dev,tensorboard,wandb,peft,examples,metrics,onnx,sql,optimizers,bench
VENV := .venv
PINS := $(shell cat constraints.txt pyproject.toml | cksum | tr -d ' ')
READY := $(VENV)/.ready-$(PINS)

# DeepSpeed builds its compiled parts with the ninja that pip put here.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-gpu check format docs bench bench-data clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

setup: $(READY)  ## make .venv with the tested versions

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(VENV)/bin/python .ci/build_ops.py ShareMemComm
	@rm -f $(VENV)/.ready-* $(VENV)/.ops
	@touch $@

# Compiled once: DeepSpeed keeps the result in TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions).
$(VENV)/.ops: $(READY)
	$(VENV)/bin/python .ci/build_ops.py ShareMemComm CPUAdam
	@touch $@

quickstart: setup  ## train a small chat model on two CPU cores (under three minutes)
	$(VENV)/bin/arctic-train recipes/quickstart.yaml

test: setup $(VENV)/.ops  ## the tests, in two processes (JOBS=1: in one)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not full and not gpu"

test-all: setup $(VENV)/.ops  ## the tests with the full matrices
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not gpu"

test-gpu: setup  ## the tests that need a CUDA device
	$(VENV)/bin/python -m pytest -m gpu

check: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: setup  ## write docs/recipe.md from the config classes
	$(VENV)/bin/python docs/generate_reference.py

bench: setup  ## time per step beside a bare DeepSpeed loop
	$(VENV)/bin/python benchmarks/overhead.py

bench-data: setup  ## preparing 100 MB of conversations, beside the tokenizer alone and TRL
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(VENV)/bin/python benchmarks/data.py

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
