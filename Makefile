# Each target makes .venv first if it is not there: on a fresh machine any of them is the only command.
PYTHON ?= python3
BIN := .venv/bin
TESTS := test_dipddpm.py $(wildcard studies/test_*.py)

.PHONY: help run test reproduce figures lint clean

help:  ## explain the targets (default)
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-9s %s\n", $$1, $$2}'

run: .venv/run  ## a short --mode prior, to a report in a few minutes (MNIST if at hand, else drawn digits)
	$(BIN)/python dipddpm.py --mode prior --dip-source bridge --limit 8000 --epochs 6 --nfe 2,5,20 \
		--samples 200

test: .venv/dev  ## all tests; the kernels run under Triton's interpreter
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --durations=5 $(TESTS)

reproduce: .venv/run  ## five student reports, done again (one of them: make reproduce-A)
	$(BIN)/python -m studies.reports A B C D E
reproduce-%: .venv/run
	$(BIN)/python -m studies.reports $*

figures: .venv/run  ## draw the README's figures again from studies/figures/*.json
	$(BIN)/python -m studies.figures studies/figures/*.json

lint: .venv/dev  ## ruff over all files
	$(BIN)/ruff check .

clean:  ## remove caches and .venv, but no runs and no data
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ kernels/__pycache__ studies/__pycache__

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@
