# flashlite: everything a developer types. `make` alone lists it.
#
# Nothing is installed outside .venv. PYTHON chooses the interpreter (3.10 or later):
#     make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MODEL := smollm2-135m-instruct
PINS := pyproject.toml constraints.txt
FUZZ_RUNS := 20000000
TSAN_SECONDS := 60

# Where the evaluation sets lie; tests that need one skip when there is none.
ifneq ($(wildcard ../shared/data),)
export FLASHLITE_DATA ?= $(abspath ../shared/data)
endif

# A machine without a C compiler gets one from PyPI.
CC_FOUND := $(shell command -v cc || command -v gcc || command -v clang)
COMPILER := $(if $(CC_FOUND),,.venv/.compiler)

.DEFAULT_GOAL := help
.PHONY: help run test lint format bench plots accept fuzz tsan fixtures constraints dist clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | \
	    awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: .venv/.run $(COMPILER) ## install, pull, quantize, compile and ask a question
	@$(BIN)/flashlite chat $(MODEL) \
	    --system "Answer in one short English sentence." -p "What is the capital of France?"

test: .venv/.dev $(COMPILER) ## the whole test suite (15 minutes at most)
	@$(BIN)/flashlite pull $(MODEL)
	@$(BIN)/python -m pytest -q

accept: .venv/.oracle $(COMPILER) ## slow checks against peers and larger models (downloads 1.4 GB)
	@$(BIN)/flashlite pull $(MODEL)
	@$(BIN)/flashlite pull gemma-3-270m --accept-license
	@$(BIN)/flashlite pull qwen2.5-coder-1.5b-instruct
	@$(BIN)/python -m pytest -q -m accept -o timeout=0 -o session_timeout=86400

fuzz: .venv/.dev ## fuzz every kernel, FUZZ_RUNS inputs (Debian: clang libclang-rt-dev llvm)
	@$(BIN)/python tests/csrc/run_fuzz.py fuzz --runs $(FUZZ_RUNS)

tsan: .venv/.dev $(COMPILER) ## the thread pool under the thread sanitizer, TSAN_SECONDS long
	@$(BIN)/python tests/csrc/run_fuzz.py tsan --seconds $(TSAN_SECONDS)

lint: .venv/.dev ## what continuous integration checks before the tests
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy src tests benchmarks
	@$(BIN)/clang-format --dry-run -Werror $(wildcard src/flashlite/csrc/*.[ch])

format: .venv/.dev ## rewrite the sources the way `lint` wants them
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(wildcard src/flashlite/csrc/*.[ch])

bench: .venv/.bench $(COMPILER) ## every benchmark beside llama.cpp and OpenVINO, in one table (an hour)
	@$(BIN)/python benchmarks/table.py --run $(if $(ROUNDS),--rounds $(ROUNDS))

plots: .venv/.bench ## draw docs/*.png from what `make bench` measured
	@$(BIN)/python benchmarks/plot.py

fixtures: .venv/.oracle ## write the small generated test files anew
	@set -e; for script in benchmarks/fixtures/make_*.py; do $(BIN)/python $$script; done

constraints: .venv/.dev ## resolve every pin anew
	@$(BIN)/python -m pip install --quiet uv
	@{ head -1 constraints.txt; $(BIN)/uv pip compile --universal --python-version 3.10 --quiet \
	    --no-annotate --no-header --upgrade --all-extras pyproject.toml | \
	    grep -vE '^(nvidia|cuda|triton)' | sort -f; } > .venv/constraints.txt
	@mv .venv/constraints.txt constraints.txt

dist: .venv/.dev ## build the wheel and the source distribution into dist/
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist

clean: ## remove everything make made here (pulled models and builds in your home stay)
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras: a fresh stamp means no installer runs at all.
.venv/bin/python:
	@$(PYTHON) -m venv .venv

.venv/.run: $(PINS) | .venv/bin/python
	@echo "installing flashlite into .venv"
	@$(PIP) -e '.[serve]'
	@touch $@

.venv/.dev: $(PINS) | .venv/bin/python
	@echo "installing flashlite and its development tools into .venv"
	@$(PIP) -e '.[serve,dev,bench,h5]'
	@touch $@ .venv/.run

.venv/.oracle: $(PINS) | .venv/.dev
	@echo "installing the reference implementations and zig into .venv"
	@$(PIP) -e '.[serve,dev,bench,h5,oracle,compiler]'
	@touch $@

.venv/.bench: $(PINS) | .venv/bin/python
	@echo "installing flashlite and what draws its plots into .venv"
	@$(PIP) -e '.[serve,bench]'
	@touch $@ .venv/.run

.venv/.compiler: $(PINS) | .venv/bin/python
	@echo "no C compiler found: installing one into .venv"
	@$(PIP) -e '.[serve,compiler]'
	@touch $@
