# The only interface: contributors, CI and the README run these targets. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
# The torch to build against; requirements/torch-*.txt lists the possible ones.
DEFAULT_TORCH := $(shell sed -nE 's/^dependencies = .*"torch==([0-9.]+)".*/\1/p' pyproject.toml)
TORCH ?= $(DEFAULT_TORCH)
ifeq ($(TORCH),$(DEFAULT_TORCH))
VENV := .venv
DIST := dist
else
VENV := .venv-$(TORCH)
DIST := dist/torch-$(TORCH)
endif

export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(VIRTUAL_ENV)/bin:$(PATH):$(HOME)/.cargo/bin
# The same interpreter for cargo and maturin, otherwise each rebuilds what the other built.
export PYO3_PYTHON := $(VIRTUAL_ENV)/bin/python
export LIBTORCH_USE_PYTORCH := 1

PACKAGES := $(VENV)/.packages
EXTENSION := python/cnnrs/_cnnrs.abi3.so
RUST := Cargo.toml Cargo.lock $(wildcard build.rs .cargo/config.toml) $(shell find src -name '*.rs')
INPUTS := $(RUST) pyproject.toml $(shell find python -name '*.py*' -not -path '*/__pycache__/*')

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | awk -F ':.* ## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(EXTENSION) ## Virtual environment, pinned packages, build (PYTHON=python3.12 picks the interpreter)

.PHONY: demo
demo: $(EXTENSION) ## Real images to trained classifiers, both roads (DATA=folder BACKBONE=vgg16 WEIGHTS=file.pth for your own)
	@python -m cnnrs.demo $(if $(DATA),--data "$(DATA)") $(if $(BACKBONE),--backbone "$(BACKBONE)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

.PHONY: test
test: $(EXTENSION) ## Rust tests, pytest, doctests, README examples
	cargo test --locked
	python -m pytest

.PHONY: test-extras
test-extras: $(EXTENSION) ## Tests of the optional packages (timm, safetensors, Ray), beside .venv in an environment of their own
	python -m venv .extras-venv
	python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.extras-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	.extras-venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/extras.txt
	PYTHONPATH="$(CURDIR)/python" .extras-venv/bin/python -m pytest tests/python/test_backbones_extras.py tests/python/test_wrappers_extras.py tests/python/test_ray.py

.PHONY: test-random
N ?= 5000
SEED ?= 0
test-random: $(EXTENSION) ## Random models and training runs against the plain loop (N=5000 SEED=0), an hour or so
	OMP_NUM_THREADS=1 python tests/python/random_models.py --count $(N) --seed $(SEED)

.PHONY: lint
# maturin sets this for pyo3's build script; without the same value each of the two throws the other's build away.
lint: export PYO3_ENVIRONMENT_SIGNATURE = $(shell $(PYO3_PYTHON) -c 'import sys; print(f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}-{sys.maxsize.bit_length() + 1}bit")')
lint: $(EXTENSION) ## Formatting, layering, clippy, ruff, mypy, stubs against the built module
	cargo fmt --check
	cargo check --locked --release
	cargo check --locked --release --features torch
	cargo clippy --locked --release -- -D warnings
	cargo clippy --locked --release --features python -- -D warnings
	ruff check .
	ruff format --check .
	mypy
	python -m mypy.stubtest --mypy-config-file pyproject.toml cnnrs._cnnrs
	scripts/locks.sh --check

.PHONY: notebooks
notebooks: $(EXTENSION) ## Run the notebooks and keep their outputs (PHOTOS=folder BACKBONE=efficientnet_lite0 for your own)
	python notebooks/execute.py $(if $(PHOTOS),"PHOTOS=$(abspath $(PHOTOS))") $(if $(BACKBONE),"BACKBONE=$(BACKBONE)")

.PHONY: bench
bench: $(EXTENSION) ## Measure against torchvision and the tutorial's loop; writes benches/RESULTS.md
	python benches/run.py

.PHONY: bench-peers
bench-peers: ## Install the other loaders and runtimes into an environment of their own, for `make bench`
	"$(PYTHON)" -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/bench.txt

.PHONY: wheel
wheel: $(PACKAGES) ## Build the wheel into dist/ (TORCH=2.11.0: the same source for an older torch)
	scripts/wheel.sh "$(TORCH)" "$(DIST)"

.PHONY: test-wheel
test-wheel: wheel ## Install the wheel into a fresh environment and run the Python tests there
	scripts/test-wheel.sh "$(TORCH)" "$(DIST)"

.PHONY: locks
locks: ## Derive locks/*.lock from Cargo.lock after a change of dependencies
	scripts/locks.sh

.PHONY: clean
clean: ## Remove everything that was built, downloaded or written
	rm -rf .venv .venv-* .extras-venv target build dist demo-output $(EXTENSION) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests benches -name __pycache__ -prune -exec rm -rf {} +

$(PACKAGES): requirements/torch-$(TORCH).txt requirements/dev.txt
	@PYTHON="$(PYTHON)" scripts/system-packages.sh
	@"$(PYTHON)" -c 'import sys; sys.exit(f"Python >= 3.10 is needed, this is {sys.version.split()[0]}: make PYTHON=<path>" if sys.version_info < (3, 10) else 0)'
	@test -x "$(PYO3_PYTHON)" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "installing torch $(TORCH) and the pinned tools into $(VENV)"
	@python -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$^)
	@touch $@

requirements/torch-%.txt:
	@echo "make: torch $* is not supported; choose TORCH= one of:" $$(ls requirements | sed -nE 's/torch-(.*)\.txt/\1/p') >&2; exit 1

$(EXTENSION): $(RUST) $(PACKAGES) pyproject.toml
	@echo "building $@ against torch $(TORCH): minutes the first time, seconds later"
	@python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
