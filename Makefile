# Needs Python 3.11 or later and nothing else; everything else goes into .venv.
# ARGS="…" is handed on: make demo ARGS="--updates 100", make test ARGS="--area delta".

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
PIP := $(INSTALL) --constraint constraints.txt
# On a GPU machine updates go by NCCL: nccl4py comes along.
EXTRA := $(shell if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; then echo '[nccl]'; fi)
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help demo test lint bench

help:
	@echo "make demo    a broker, a trainer and two workers do online RL here (three minutes)"
	@echo "make test    every test that this machine can run"
	@echo "make lint    style, types and layers only"
	@echo "make bench   rounds over the gloo window beside two baselines"

demo: .venv/.runtime
	@$(BIN)/sparsecast demo $(ARGS)

test: .venv/.dev
	@$(BIN)/python -m tests.run $(ARGS)

lint: .venv/.dev
	@$(BIN)/python -m tests.run --area lint --area types --area layers

bench: .venv/.runtime
	@$(BIN)/python bench/round.py --device cpu $(ARGS)

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sparsecast needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Install one and name it: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
		echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }
	@touch $@

# Without an NVIDIA GPU the CPU build of torch is asked for first: the default Linux build brings
# gigabytes of CUDA along. Only the answer "not offered" leads to the default build; any other
# failure (network, disk) is told and ends here.
.venv/.runtime: pyproject.toml constraints.txt .venv/.made
	@$(PIP) setuptools wheel
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /dev/nvidia0 ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
		$(INSTALL) --no-deps "$(TORCH)+cpu" 2>.venv/torch.err || { \
			if grep -q "versions: none" .venv/torch.err || \
				! grep -q "No matching distribution" .venv/torch.err; then \
				cat .venv/torch.err >&2; exit 1; fi; \
			echo "No CPU build of $(TORCH) is offered here: installing the default build, which may bring CUDA."; \
			echo "To avoid that, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, remove .venv and run make again."; \
			$(PIP) "$(TORCH)"; }; \
	else \
		$(PIP) "$(TORCH)"; \
	fi
	@$(PIP) --no-build-isolation --editable ".$(EXTRA)"
	@touch $@

.venv/.dev: .venv/.runtime
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@
