# `make help` lists what there is. Everything happens in .venv/ with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := CMakeLists.txt $(foreach end,h cpp cu cuh,$(wildcard csrc/*.$(end) csrc/*/*.$(end)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench bench-gpu wheel clean always

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A system Python may come without ensurepip; its own pip can fill the environment instead.
.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.12 (say)"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && \
	  $(PYTHON) -m pip --python .venv/bin/python install pip; }

# Build tools first: the package is then built against the installed torch, without isolation.
.venv/.installed: constraints.txt pyproject.toml setup.py | .venv/bin/python
	@echo "Setup 1 of 2: installing PyTorch and the other packages into .venv/ (6 GB; some 3 minutes)."
	$(PIP) install --quiet -c constraints.txt setuptools wheel cmake ninja torch
	@echo "Setup 2 of 2: installing ueo_fast, which compiles the CPU kernels (some 30 seconds)" \
	  "and, where there are nvcc and a GPU or CUDA=1, the CUDA kernels (minutes)."
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet -c constraints.txt \
	  --no-build-isolation -e ".[dev]"
	@touch $@

# Another wish (`make CUDA=0 setup`, say) is a reason to build again; written only where it changed.
build/wish: always
	@mkdir -p build; wish='$(CUDA) $(CUDACXX) $(UEO_FAST_CUDA_ARCHITECTURES)'; \
	  test "$$(cat $@ 2>/dev/null)" = "$$wish" || echo "$$wish" > $@

# Stands for _cuda.so as well, which is not built everywhere.
ueo_fast/_cpu.so: $(SOURCES) build/wish | .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

setup: .venv/.installed ueo_fast/_cpu.so
.PHONY: setup

demo: setup ## adapt a small CLIP to unlabelled digits with unknown classes among them
	$(BIN)/ueo-fast demo

# A worker begins with tests that lie side by side, so that what a file shares is made once, and takes
# over some of another's when it has none left.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: setup ## every test but the slow extras
	$(PYTEST)

test-all: setup ## every test
	$(PYTEST) -m "slow or not slow"

lint: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## measure loss, affine layers, a tower's step and loading images; writes benchmarks/results/*.csv and the pictures in docs/
	$(BIN)/python -m benchmarks

bench-gpu: ## on a machine with a GPU: build, test, sanitise and measure (benchmarks/gpu.sh)
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh

wheel: setup ## dist/ueo_fast-*-py3-none-<platform>.whl
	rm -rf build/lib* build/bdist*  # setuptools would ship what was deleted since the last build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps -w dist .

clean: ## remove the environment and everything that was built
	rm -rf .venv build dist *.egg-info ueo_fast/*.so ueo_fast/_cuda.json \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
