# lpcompile: `make help` lists what is here.
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
TORCH_INDEX ?=
BIN := $(VENV)/bin
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
STAMP := $(VENV)/.installed
TRAIN_FLAGS ?=
REPRODUCE_FLAGS ?= --full
BARE := $(VENV)/no-compiler
# one process a core, and the files of a test folder stay together; OpenMP's threads of one do not spin on the other's core
TESTS := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train reproduce test test-machines test-all lint format bench clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  VENV_FLAGS=--system-site-packages  use the torch that this machine already has"
	@echo "  TORCH_INDEX=URL                    take torch from that pip index (see the README)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@# torch first and alone, so that the pinned CPU build, or the torch that is there, satisfies everything after it
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(INDEX) -c constraints.txt torch
	@sed '/^torch==/d' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install -q -c $(VENV)/constraints.txt setuptools ninja numpy
	$(BIN)/pip install -q -c $(VENV)/constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev,deepspeed]'
	@touch $@

train: $(STAMP) ## train the default GPT with hfp8 on 2 DeepSpeed workers, then in fp32, and compare
	$(BIN)/python -m launch train --policy hfp8 --engine deepspeed --nproc 2 --capture joint --compare fp32 $(TRAIN_FLAGS)

reproduce: $(STAMP) ## published claims run again, docs/reproduction.md (hours; REPRODUCE_FLAGS=--short: minutes); goes on if stopped
	$(BIN)/python -m launch reproduce $(REPRODUCE_FLAGS)

test: lint ## lint, then every test but the slow ones (under 15 minutes on 2 cores)
	$(TESTS) -m "not slow"

test-machines: $(STAMP) ## the same tests as other machines run them: one thread, no AVX-512 in oneDNN, no compiler
	OMP_NUM_THREADS=1 $(TESTS) -m "not slow"
	ONEDNN_MAX_CPU_ISA=AVX2 $(TESTS) -m "not slow"
	@# the tools beside the compilers stay on PATH; an empty cache holds no kernel that an earlier run built
	@rm -rf $(BARE) && mkdir -p $(BARE)/bin $(BARE)/cache && chmod 700 $(BARE)/cache
	@for tool in sh bash env git nproc uname cat ls; do ln -s $$(command -v $$tool) $(BARE)/bin/; done
	PATH=$(abspath $(BIN)):$(abspath $(BARE)/bin) XDG_CACHE_HOME=$(abspath $(BARE)/cache) $(TESTS) -m "not slow"

test-all: lint ## lint, then every test
	$(TESTS) --timeout 1800

lint: $(STAMP) ## ruff, mypy --strict, and the four floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## every benchmark, as ratios
	$(BIN)/python -m launch bench

clean: ## remove what was built (not the runs)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
