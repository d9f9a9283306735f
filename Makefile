PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
# DATA=<folder>: an unpacked CIFAR-10 image folder for the slow checks
export DATA

.PHONY: help setup demo federated-demo test test-former test-latter test-slow test-oldest lint format wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python >= 3.10 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

setup: $(VENV)/.ready  ## make the virtual environment and install everything into it

demo: setup  ## train on digits with ddp, then with compressed_ddp; print a table, write a picture
	$(BIN)/python -m recipes.resnet.demo

federated-demo: setup  ## ten clients learn digits in Flower's simulation (Python >= 3.11): a table and two pictures
	$(BIN)/python -W ignore -m recipes.federated.demo

# In two halves side by side: most tests wait for processes that wait for each other.
LATTER := tests/strategies tests/callbacks tests/advice tests/benchmarks tests/recipes
test: setup  ## run the tests (at most 10 minutes on 2 cores)
	@$(MAKE) --no-print-directory -j2 test-former test-latter

test-former:
	$(BIN)/python -m pytest $(addprefix --ignore=,$(LATTER))

test-latter:
	$(BIN)/python -m pytest $(LATTER) -p no:cacheprovider

test-slow: setup  ## run the slow checks too; DATA=<unpacked CIFAR-10 image folder> for those on real data
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 1800

OLDEST_PINS ?= lightning==2.6.0 torch==2.10.0 torchvision==0.25.0
test-oldest:  ## run the tests on the oldest Lightning, torch and torchvision that pyproject.toml promises
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --upgrade pip
	$(OLDEST)/bin/python -m pip install $(OLDEST_PINS)
	$(OLDEST)/bin/python -m pip install -e ".[test,fast,primal-dual,recipes,wandb]" $(OLDEST_PINS)
	$(OLDEST)/bin/python -m pytest

lint: setup  ## ruff, ruff format, mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_distopt

format: setup  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup  ## build the wheel and the source archive into dist/
	$(BIN)/python -m build

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(OLDEST) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
