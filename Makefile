# Two commands for a newcomer: `make demo` and `make test`. The others are for those who work on fedscan.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test check bench engines docs clean
help:            ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

# NVFlare and Flower do not agree with each other, nor with all of fedscan's requirements: each has an environment, in
# which fedscan needs the standard library only.
.venv-nvflare/ready: pyproject.toml
	$(PYTHON) -m venv .venv-nvflare
	.venv-nvflare/bin/python -m pip install -q --disable-pip-version-check 'nvflare>=2.9,<2.10'
	.venv-nvflare/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

.venv-flower/ready: pyproject.toml
	$(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install -q --disable-pip-version-check 'flwr>=1.41,<1.43'
	.venv-flower/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

engines: .venv-nvflare/ready .venv-flower/ready    ## what carries studies between hospitals: NVFlare and Flower

demo: .venv/ready    ## five simulated hospitals train one model; ends with a report
	$(BIN)/fedscan demo

check: .venv/ready   ## lint, types and the fast tests: before every commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow'

test: .venv/ready engines    ## everything that CI runs, the slow tests too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

docs: .venv/ready    ## writes the pages that follow from code: methods, models, commands, keys of a study file
	$(BIN)/python docs/make.py

bench: .venv/ready   ## the figures of docs/benchmarks.md that need neither a GPU nor scans; some minutes
	$(BIN)/python benchmarks/overhead.py --case unet
	$(BIN)/python benchmarks/overhead.py --case cnn
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/merge.py

clean:           ## remove what the commands above made
	rm -rf .venv .venv-nvflare .venv-flower build src/*.egg-info
