# The only interface: contributors, CI and the README run these targets. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
# cargo and pytest share the cores themselves.
.NOTPARALLEL:

PYTHON ?= python3
# The torch to develop with. Another of requirements/torch-*.txt has an environment of its own, with the wheel.
DEFAULT_TORCH := 2.15.0
TORCH ?= $(DEFAULT_TORCH)
VENV := .venv$(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),-$(TORCH))
# The torch that the companion package is built for; libtorch/locks holds the others.
LIBTORCH := 2.13.0

export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(VIRTUAL_ENV)/bin:$(PATH):$(HOME)/.cargo/bin
# The same interpreter for cargo and maturin, otherwise each rebuilds what the other built.
export PYO3_PYTHON := $(VIRTUAL_ENV)/bin/python

PACKAGES := $(VENV)/.packages
EXTENSION := python/cnnrs/_cnnrs.abi3.so
RUST := Cargo.toml Cargo.lock build.rs .cargo/config.toml $(shell find src -name '*.rs')
WHEEL := dist/.wheel
COMPANION := dist/libtorch-$(TORCH)/.wheel
# The tree with its extension, or the wheel as its users install it.
ifeq ($(TORCH),$(DEFAULT_TORCH))
INSTALLED := $(EXTENSION)
TESTS :=
else
INSTALLED := $(VENV)/.wheel
TESTS := --pyargs tests/python cnnrs
ifneq ($(filter lint test-extras,$(MAKECMDGOALS)),)
$(error lint and test-extras are about the tree: without TORCH=$(TORCH))
endif
endif

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | awk -F ':.* ## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(INSTALLED) ## Virtual environment, pinned packages, build (PYTHON=python3.12 picks the interpreter)

.PHONY: demo
demo: $(INSTALLED) ## Real images to trained classifiers, both roads (DATA=folder BACKBONE=vgg16 WEIGHTS=file.pth for your own)
	@python -m cnnrs.app.demo $(if $(DATA),--data "$(DATA)") $(if $(BACKBONE),--backbone "$(BACKBONE)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

.PHONY: test
test: $(INSTALLED) ## Rust tests, pytest, doctests, README examples (TORCH=2.13.0: the wheel beside that torch, Python tests)
	$(if $(TESTS),,cargo test --locked --release --config tests/checked.toml)
	OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist worksteal $(TESTS)

.PHONY: test-memory
test-memory: $(EXTENSION) ## Training in Python with debug assertions: two slices that overlap while one may be written are an error
	cargo build --locked --release --lib --features python --config tests/checked.toml
	rm -rf build/checked && mkdir -p build && cp -r python build/checked
	cp target/release/libcnnrs.so build/checked/cnnrs/_cnnrs.abi3.so
	PYTHONPATH="$(CURDIR)/build/checked" OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist worksteal $(addprefix tests/python/,engine training identity)

.PHONY: test-extras
test-extras: $(EXTENSION) ## Tests of the optional packages (timm, safetensors, Ray, pillow-heif), beside .venv in an environment of their own
	python -m venv .extras-venv
	python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.extras-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	.extras-venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/extras.txt
	PYTHONPATH="$(CURDIR)/python" .extras-venv/bin/python -m pytest tests/python/model/test_backbones_extras.py tests/python/app/test_report_extras.py tests/python/image/test_wrappers_extras.py tests/python/data/test_heif_extras.py tests/python/features/test_ray.py

.PHONY: test-random
N ?= 5000
SEED ?= 0
test-random: $(INSTALLED) ## Random models and training runs against the plain loop (N=5000 SEED=0), an hour or so
	OMP_NUM_THREADS=1 python tests/python/support/random_models.py --count $(N) --seed $(SEED)

.PHONY: lint
# maturin sets this for pyo3's build script; without the same value each of the two throws the other's build away.
lint companion-lint test-memory: export PYO3_ENVIRONMENT_SIGNATURE = $(shell $(PYO3_PYTHON) -c 'import sys; print(f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]}-{sys.maxsize.bit_length() + 1}bit")')
# Docs without the feature: rustdoc 1.95 stops at a bug of its own over numpy's traits.
lint: $(EXTENSION) ## Formatting, clippy, links of the docs, ruff, mypy, stubs against the built module
	cargo fmt --check
	cd libtorch && cargo fmt --check
	cargo clippy --locked --release -- -D warnings
	cargo clippy --locked --release --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --locked --release --no-deps --document-private-items
	ruff check .
	ruff format --check .
	mypy
	python -m mypy.stubtest --mypy-config-file pyproject.toml cnnrs._cnnrs
	scripts/locks.sh --check

.PHONY: notebooks
notebooks: $(INSTALLED) ## Run the notebooks and keep their outputs, without network (PHOTOS=folder DATA= BACKBONE= LEARNING_RATE= EPOCHS=)
	python notebooks/execute.py $(NOTEBOOK) $(if $(PHOTOS),"PHOTOS=$(abspath $(PHOTOS))") $(if $(DATA),"DATA=$(abspath $(DATA))") $(foreach name,BACKBONE LEARNING_RATE EPOCHS PER_CLASS,$(if $($(name)),"$(name)=$($(name))"))

.PHONY: bench
bench: $(INSTALLED) ## Measure against torchvision and the tutorial's loop; writes benches/RESULTS.md
	python benches/run.py

.PHONY: bench-peers
bench-peers: ## Install the other loaders and runtimes into an environment of their own, for `make bench`
	"$(PYTHON)" -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/bench.txt

.PHONY: wheel
wheel: $(WHEEL) ## Build the wheel into dist/: one for every torch and every Python

.PHONY: gpu-carry gpu-rehearsal
gpu-carry: $(WHEEL) ## All that scripts/gpu-check.sh needs on a machine with a GPU, in build/gpu-carry, below 60 MiB
	PYTHON="$(PYTHON)" scripts/gpu-carry.sh build/gpu-carry
gpu-rehearsal: $(PACKAGES) gpu-carry ## The GPU check on the CPU, tiny, in a folder of its own: shows that it runs, measures nothing
	bare=$$(mktemp -d) && trap 'rm -rf "$$bare"' EXIT && cp -r build/gpu-carry/. "$$bare" && \
	    DEVICE=cpu OUT=build/gpu-rehearsal PYTHON="$(PYO3_PYTHON)" "$$bare/scripts/gpu-check.sh"

.PHONY: libtorch lint-libtorch test-libtorch
libtorch: ## Build the wheel of the companion (engine "torch") into dist/libtorch-2.13.0/ (LIBTORCH=2.11.0 for another torch)
lint-libtorch: ## Clippy of the companion, its stubs against the built module
test-libtorch: ## Both wheels beside the companion's torch: the tests of engine "torch", of wheels and of importing
libtorch lint-libtorch test-libtorch:
	@scripts/companion-tree.sh $(LIBTORCH) >/dev/null
	@$(MAKE) --no-print-directory TORCH=$(LIBTORCH) companion-$(firstword $(subst -, ,$@))

.PHONY: companion-libtorch companion-lint companion-test
companion-libtorch: $(COMPANION)
companion-lint: $(VENV)/.companion
	tree=$$(scripts/companion-tree.sh $(TORCH)) && cd "$$tree" && cargo clippy --locked --release -- -D warnings
	python -m mypy.stubtest --mypy-config-file pyproject.toml cnnrs_libtorch._libtorch
companion-test: $(VENV)/.companion
	python -m pytest -m "libtorch or wheel" $(TESTS)

.PHONY: locks
locks: ## Derive libtorch/locks/*.lock from libtorch/Cargo.lock after a change of dependencies
	scripts/locks.sh

.PHONY: clean
clean: ## Remove everything that was built, downloaded or written
	rm -rf .venv .venv-* .extras-venv .bench-venv target fuzz/target build dist demo-output $(EXTENSION) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests benches libtorch -name __pycache__ -prune -exec rm -rf {} +

$(PACKAGES): requirements/torch-$(TORCH).txt requirements/dev.txt
	@PYTHON="$(PYTHON)" scripts/system-packages.sh
	@test -x "$(PYO3_PYTHON)" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "installing torch $(TORCH) and the pinned tools into $(VENV)"
	@python -m pip install --quiet --disable-pip-version-check $(addprefix -r ,$^)
	@touch $@

requirements/torch-%.txt:
	@echo "make: torch $* is not among the tested ones; choose TORCH= one of:" $$(ls requirements | sed -nE 's/torch-(.*)\.txt/\1/p') >&2; exit 1

$(EXTENSION): $(RUST) $(PACKAGES) pyproject.toml
	@echo "building $@: minutes the first time, seconds later"
	@python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

$(WHEEL): $(RUST) pyproject.toml README.md scripts/wheel.sh requirements/wheel.txt $(shell find python -type f -not -name '*.so' -not -path '*/__pycache__/*')
	PYTHON="$(PYTHON)" scripts/wheel.sh dist
	@touch $@

$(VENV)/.wheel: $(PACKAGES) $(WHEEL)
	python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/cnnrs-*.whl
	python -m pip check
	@touch $@

$(COMPANION): $(PACKAGES) $(RUST) scripts/companion-tree.sh $(shell find libtorch -type f -not -name '*.so' -not -path '*/__pycache__/*')
	@echo "building the companion for torch $(TORCH)"
	rm -rf "$(@D)"
	tree=$$(scripts/companion-tree.sh $(TORCH)) && cd "$$tree" && maturin build --release --locked --out "$(CURDIR)/$(@D)"
	@touch $@

$(VENV)/.companion: $(COMPANION) $(INSTALLED)
	python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/libtorch-$(TORCH)/*.whl
	python -m pip check
	@touch $@
