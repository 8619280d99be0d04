# The commands of this repository; `make help` lists them. Everything runs in .venv, which `setup` makes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The interpreter for .venv: the first supported one on PATH.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3 2>/dev/null))
# Address of PyTorch's CPU package index, for machines on which pip would install the CUDA build.
TORCH_INDEX ?=
# Arguments for pytest, and the benchmark to run (ONLY=teacher runs bench_teacher.py).
ARGS ?=
ONLY ?=
# Test processes, one per core. A process takes the next file when it is through with one: long files come first.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

PACKAGES := common rollout_workers teacher_server learner deploy tests
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
LOCKS := deploy/requirements/cpu.txt deploy/requirements/cpu-nodeps.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup older demo test test-unit test-faults test-families soak check format bench bench-smoke gpu-check docs clean lock

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything, pinned

older: setup ## install transformers 4.57 into a folder of .venv, for the test that it reads exports alike
	$(PIP) install --no-deps --upgrade --quiet --target $(VENV)/transformers-4.57 transformers==4.57.6 huggingface-hub==0.36.0 tokenizers==0.22.1

demo: setup models/smollm2/config.json ## distil four worked examples into SmolLM2 on CPU, end to end
	$(BIN)/opcd train deploy/configs/demo.yaml

test: setup ## run the whole test suite
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-unit: setup ## run the unit tests
	$(BIN)/python -m pytest tests/unit $(PARALLEL) $(ARGS)

test-faults: setup ## kill every process of a run at every moment (about an hour)
	$(BIN)/python -m pytest tests/faults -m "matrix or not matrix" $(ARGS)

test-families: setup ## run every model family through teacher, learner and engine (half an hour)
	$(BIN)/python -m pytest tests/integration/deploy/test_models_page.py tests/e2e/test_families.py -m "families or not families" $(ARGS)

soak: setup ## load and fuzz the teacher server for minutes instead of seconds
	$(BIN)/python -m pytest --long -s tests/integration/teacher_server/test_soak.py tests/integration/teacher_server/test_openapi.py tests/unit/teacher_server/http/test_fuzz.py $(ARGS)

check: setup ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup models/smollm2/config.json ## run the benchmarks, all or ONLY=name, and add the figures to runs/bench/history.jsonl
	$(BIN)/python -m tests.benchmarks $(ONLY)

bench-smoke: setup ## check in five minutes that no figure is twice as bad as its target
	$(BIN)/python -m tests.benchmarks smoke

gpu-check: ## check a GPU machine before the first run, in ten minutes; without a GPU in tiny sizes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu $(ARGS)

docs: setup ## build the documentation into site/
	$(BIN)/python -m deploy.docs_tools.docs --check
	$(BIN)/python -m deploy.docs_tools.sizes --check
	$(BIN)/python -m deploy.docs_tools.roofline --check
	$(BIN)/python -m deploy.docs_tools.results --check
	$(BIN)/python -m deploy.docs_tools.licences --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove .venv, caches and built files (runs/ and models/ stay)
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(LOCKS) pyproject.toml
	@bash deploy/preflight.sh "$(PYTHON)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r deploy/requirements/cpu.txt
	$(PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r deploy/requirements/cpu-nodeps.txt
	$(PIP) install --quiet --no-deps --editable .
	@touch $@

models/smollm2/config.json: | $(STAMP)
	$(BIN)/opcd prepare smollm2 --out models/smollm2

format: setup ## let ruff fix formatting and lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## rewrite the lock from .venv: change .venv with pip and run the tests first
	bash deploy/requirements/lock.sh
