# Everything sets itself up: a bare machine needs only Python 3.11+, pip, git and make.
#   make demo          from nothing to a report with pictures (about six minutes on two cores)
#   make test          the test suite                  make check   format, lint, types, import rules
#   make test-long     the tests that take longer
#   make docs          the documentation site         make bench   the benchmarks that fit a CPU
# At first, without an NVIDIA driver, the CPU build of torch is taken if its index can be reached (the CUDA packages are 6 GB). Another
# build, at first or later: make setup TORCH=cpu (or cu128, ... as uv names them).

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?=
DEMO   ?= demo
UV     := .uv/bin/uv
BIN    := $(VENV)/bin
# one stamp for each build of torch; without TORCH, that which is installed
STAMP  := $(if $(TORCH),$(VENV)/.installed-$(TORCH),$(firstword $(wildcard $(VENV)/.installed*) $(VENV)/.installed))
BUILD  := $(or $(TORCH),$(patsubst $(VENV)/.installed-%,%,$(filter $(VENV)/.installed-%,$(STAMP))))
OTHER  := $(filter-out $(STAMP),$(wildcard $(VENV)/.installed*))

.PHONY: setup demo test test-long check format docs bench clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit("muvit needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet uv

$(STAMP): pyproject.toml | $(UV)
	$(if $(OTHER),@$(UV) pip install --quiet --dry-run --no-deps --python $(BIN)/python --torch-backend $(BUILD) torch)
	$(UV) venv --quiet $(if $(OTHER),--clear,--allow-existing) --python $(PYTHON) $(VENV)
	@build="$(BUILD)"; \
	if [ -z "$$build" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	  && ! $(UV) pip show --quiet --python $(BIN)/python torch 2>/dev/null \
	  && UV_HTTP_TIMEOUT=5 UV_HTTP_RETRIES=0 $(UV) pip install --quiet --dry-run --no-deps --python $(BIN)/python \
	     --torch-backend cpu torch 2>/dev/null; then build=cpu; fi; \
	$(UV) pip install --quiet --python $(BIN)/python $${build:+--torch-backend $$build} --editable . --group dev
	@touch $@

demo: $(STAMP)
	$(BIN)/muvit demo --output $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long -n auto --maxprocesses 8 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(UV) pip install --quiet --python $(BIN)/python --group docs
	rm -rf build/docs && mkdir -p build && cp -RL docs build/docs # with the benchmark results, which are linked into it
	$(BIN)/python -m zensical build --strict --clean
	@echo site/index.html

# at a size for a CPU, a few minutes; the committed results in benchmarks/results/ are those of the full size
bench: $(STAMP)
	$(BIN)/python benchmarks/synthetic_leak_probe.py --variants small --train-images 60 --test-images 20 \
		--train-crops 480 --test-crops 160 --epochs 10 4 --output build/bench/synthetic_leak_probe.md

clean:
	rm -rf $(VENV) .uv build dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
