# make quickstart          the main job on this machine, from nothing;  ARGS="rl.steps=2 ..." overrides the config
# make label               a person judges samples of the quickstart;  ARGS="--limit 10"
# make test                the test suite;                             ARGS="-k name" goes to pytest
# make variants            tests of other losses, stages and numbers of ranks, and of the locks; `make test` leaves them out
# make chaos               kills every kind of process in every phase of real runs;  ARGS="rollout driver" for some
# make fuzz                10,000 damaged and hostile inputs: none may crash, hang or take 1 GB
# make architectures       tries every architecture, writes docs/architectures.md
# make bench               how fast each part is, against references;   ARGS="learner publish" for some
# make test-gpu            the tests that need an NVIDIA GPU; bench-gpu the benchmarks;  GPU_PYTHON=python with CUDA builds
# make lint | fix | docs   checks; mends what tools can mend; writes docs/configuration.md
# make lock                resolves requirements/*.txt anew (needs uv); ARGS=--upgrade takes the newest versions
# make clean               removes the environment and caches, keeps runs/
#
# Needs make and a C compiler. Takes the first Python 3.11 to 3.13 on PATH (or PYTHON=/path), else lets uv fetch one.
# pip's settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) are respected.
PYTHON ?=
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
ARGS ?=
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := orchestrator actors jobs benchmarks tests

export PYTHON CPU_WHEELS
# Set to nothing: otherwise every process compiles its modules anew.
export PYTHONDONTWRITEBYTECODE :=
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false
test: export HF_HUB_OFFLINE := 1
test: export TRANSFORMERS_OFFLINE := 1
variants: export HF_HUB_OFFLINE := 1
variants: export TRANSFORMERS_OFFLINE := 1
chaos: export HF_HUB_OFFLINE := 1
chaos: export TRANSFORMERS_OFFLINE := 1

.PHONY: quickstart label test variants test-gpu chaos fuzz architectures bench bench-gpu lint fix docs lock clean setup setup-dev
.DEFAULT_GOAL := quickstart

setup:
	@requirements/install.sh $(VENV) requirements/cpu.txt

setup-dev:
	@requirements/install.sh $(VENV) requirements/cpu.txt requirements/dev.txt

quickstart: setup
	@$(BIN)/python -m jobs quickstart $(ARGS)

# Opens the labelling service on the newest quickstart, and compares its reward model with the person who judged.
label: setup
	@$(BIN)/python -m jobs label quickstart $(ARGS)

# Light tests first, on all cores; then those that start Ray, engines or learners.
test: setup-dev
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/tests $(ARGS)

# What the suite shows once, shown for other losses, stages and numbers of ranks; and the locks against the index.
variants: setup-dev
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/integration tests/ray_local tests/contract -m variant $(ARGS)

# Every kind of process killed in every phase, real parts; about half an hour on two cores.
chaos: setup-dev
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.chaos.matrix $(ARGS)
	@$(BIN)/python -m pytest tests/chaos/test_stops.py

# The suite runs a share of these; every input has a limit of its own.
fuzz: setup-dev
	@FUZZ_SHARE=1 $(BIN)/python -m pytest tests/chaos/test_fuzz.py tests/chaos/test_fuzz_data.py \
		tests/chaos/test_fuzz_bombs.py -q --timeout 7200 $(ARGS)

# About three minutes on two cores.
architectures: export HF_HUB_OFFLINE := 1
architectures: export TRANSFORMERS_OFFLINE := 1
architectures: setup-dev
	@$(BIN)/python -m tests.matrix

bench bench-gpu test-gpu: export HF_HUB_OFFLINE := 1
bench bench-gpu test-gpu: export TRANSFORMERS_OFFLINE := 1
bench: setup-dev
	@$(BIN)/python -m benchmarks $(ARGS)

# GPU_PYTHON: of an environment with CUDA builds (requirements/gpu.txt), such as the image's. With pytest for test-gpu.
bench-gpu:
	@$(GPU_PYTHON) -m benchmarks --gpu $(ARGS)

test-gpu:
	@REQUIRE_GPU=1 $(GPU_PYTHON) -m pytest tests/gpu -q $(ARGS)

lint: setup-dev
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@PYTHONPATH=. $(BIN)/lint-imports --no-cache
	@$(BIN)/mypy

fix: setup-dev
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

docs: setup-dev
	@$(BIN)/python -m jobs.configuration_docs

lock:
	@requirements/lock.sh $(ARGS)

clean:
	rm -rf $(VENV) .uv .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
