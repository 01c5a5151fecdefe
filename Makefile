# Each target makes .venv first if it is not there: on a fresh machine any of them is the only command.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help run test reproduce figures soak lint clean

help:  ## explain the targets (default)
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "  make %-9s %s\n", $$1, $$2}'

run: .venv/run  ## a short --mode prior, to a report in a few minutes (MNIST if at hand, else drawn digits)
	$(BIN)/python dipddpm.py --mode prior --limit 10000 --epochs 5 --samples 400

test: .venv/dev  ## all tests; the kernels run under Triton's interpreter
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --durations=5 test_dipddpm.py

reproduce: .venv/run  ## the five reports' studies and tables, all (one: make reproduce-A)
	$(BIN)/python reproduce.py A B C && OMP_NUM_THREADS=1 $(MAKE) -j2 reproduce-D reproduce-E
reproduce-%: .venv/run
	$(BIN)/python reproduce.py $*

figures: .venv/run  ## draw the README's figures again from figures/*.json
	$(BIN)/python -m studies.figures figures/*.json

soak: .venv/dev  ## the hard tests at full size: 200 kills, 110,000 damaged files, every number of the command line at every extreme
	KILLS=200 FUZZED=10000 FLAGS=1000 $(BIN)/python -m pytest -q -k "killed or mutated or beyond_all" test_dipddpm.py

lint: .venv/dev  ## ruff over all files
	$(BIN)/ruff check .

clean:  ## remove caches and .venv, but no runs and no data
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ kernels/__pycache__

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@
