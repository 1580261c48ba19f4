# Everything sets itself up: .venv from the hashed lock, and the programs that tests want where they
# may be installed. Nothing asks, nothing reads standard input.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-all test-dnf test-librepo check format bench bench-peers soak lock clean

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
# Test processes; each test file stays in one. WORKERS=0 runs all in one process.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile
SOURCES := chunkstore client server measure tests scripts
PACKAGES := chunkstore/tidings_chunkstore client/tidings_client server/tidings_server measure/tidings_measure
# Options for one run: make test ARGS="-k recipe -x"
ARGS ?=

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: ## set up .venv when the lock or pyproject.toml changed
	@scripts/setup-venv $(VENV)

demo: venv ## the main job at work: publish, change, publish, serve, sync twice, what was saved
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) scripts/demo.py $(ARGS)

test: venv ## set up everything and run the tests, but the slow ones
	@scripts/system-packages
	$(PYTEST) -m "not slow" $(ARGS)

test-all: venv ## all tests, the slow ones too
	@scripts/system-packages
	$(PYTEST) $(ARGS)

test-dnf: venv ## dnf 4, and in a chroot of Debian sid, where it can be made, its dnf 4 and dnf 5 (15 minutes)
	@scripts/system-packages
	@scripts/dnf5-chroot || echo "test-dnf: no chroot, so the tests of dnf 5 skip" >&2
	$(PY) -m pytest tests/dnf $(ARGS)
	TIDINGS_DNF4=sid $(PY) -m pytest tests/dnf/test_dnf4.py $(ARGS)

test-librepo: venv ## build Debian's librepo with zchunk on and load a rebuilt cache with it (minutes)
	@scripts/system-packages
	TIDINGS_LIBREPO=.make/librepo $(PY) -m pytest tests/zchunk -v $(ARGS)

check: venv ## lint, format, types, import layers, locks
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(PACKAGES)
	@# mypy takes a name once, and pytest wants both conftest.py
	$(BIN)/mypy --allow-untyped-defs --allow-untyped-calls --allow-any-generics \
		--exclude 'tests/dnf/conftest\.py$$' tests
	$(BIN)/lint-imports
	$(PY) -m pip check
	@! grep -nE '://|^ *(-i|-f|--(extra-)?index-url|--find-links)' requirements/*.txt \
		|| { echo "check: a lock names a host" >&2; exit 1; }

format: venv ## rewrite the code as the checks want it
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: venv ## measure publish, sync and serve beside zstd and nginx, in one run
	@scripts/system-packages
	@scripts/run-benches bench $(ARGS)

bench-peers: venv ## bytes and requests beside casync, zchunk and rsync, in one run
	@scripts/system-packages
	@scripts/run-benches peers $(ARGS)

soak: venv ## 10 minutes of everything at once, with kills and damage; ARGS="--minutes 1 --seed 2"
	@scripts/system-packages
	PYTHONPATH=tests $(PY) -m soak.soak --minutes 10 --report soak.json $(ARGS)

lock: ## pin the dependencies anew; ARGS="--upgrade" or package names to move them
	scripts/lock $(ARGS)

clean: ## remove what these targets made
	rm -rf $(VENV) .make build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
