# Ollama Endpoint Manager. `make` lists what can be made; programs of the tests are in tests/tools/.
#
#   PYTHON=…   the interpreter to build the environment with, 3.11 or newer
#   UV=…       the uv to use; without one on the PATH it is installed into .build/
#   ARGS=…     more arguments for the target's program: make run ARGS="--port 11434"

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# The stamp: as new as the environment, named after the Python in it.
READY := $(VENV)/.ready-$(PYTHON_VERSION)

UV_VERSION := 0.13.8
OWN_UV := .build/uv/bin/uv
# `command -v` is not enough: a version manager's uv may be there and refuse to run.
ifndef UV
UV := $(if $(shell uv --version 2>/dev/null),uv,$(OWN_UV))
endif
export UV
export UV_PYTHON_DOWNLOADS := never
# Trust what the system trusts: behind a company's certificate authority uv's own list knows too little.
# Older versions of uv read the second name.
export UV_SYSTEM_CERTS ?= true
export UV_NATIVE_TLS ?= true

.PHONY: help
help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Make the Python environment in .venv, as requirements.lock says.

.PHONY: run
run: setup ## Prepare everything (environment, Docker Engine, images) and serve in the foreground.
	@exec $(BIN)/python -m manager up --yes --without-images "$(BIN)/python -m tests.tools.simulated" $(ARGS)

.PHONY: demo
demo: setup ## Show the main job once: offline, on an engine of its own; nothing of it stays.
	@exec $(BIN)/python -m tests.tools.demo $(ARGS)

.PHONY: demo-swarm
demo-swarm: setup ## Show two hosts of which one is lost, on engines of their own; nothing of it stays.
	@exec $(BIN)/python -m tests.tools.demo_swarm $(ARGS)

.PHONY: check
check: setup ## Lint, types, layers and unit tests.
	@exec $(BIN)/python -m tests.tools.suite check

.PHONY: test
test: setup ## Everything: what `check` does, and every test with coverage.
	@exec $(BIN)/python -m tests.tools.suite test $(ARGS)

.PHONY: test-engines
test-engines: setup ## The integration tests on other engines: Docker of Debian sid, Podman (as root).
	@exec $(BIN)/python -m tests.tools.engines $(ARGS)

.PHONY: test-clients
test-clients: setup ## Other people's clients, in several generations; installs them from the registries.
	@exec $(BIN)/python -m tests.tools.clients $(ARGS)

.PHONY: mutants
mutants: setup ## Break random places in domain/ and services/; print those that no test noticed.
	@exec $(BIN)/python -m tests.tools.mutants $(ARGS)

.PHONY: bench
bench: setup ## Measure, and print a table.
	@exec $(BIN)/python -m tests.bench $(ARGS)

.PHONY: screenshots
screenshots: setup ## Take pictures of every page into docs/images.
	@exec $(BIN)/python -m tests.tools.screenshots $(ARGS)

.PHONY: image
image: setup ## Build the daemon's own container image (compose/README.md).
	@exec $(BIN)/python compose/build.py $(ARGS)

.PHONY: lock
lock: supported-python $(filter $(OWN_UV),$(UV)) ## Write requirements.lock anew; ARGS=--upgrade for newer versions.
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --group dev pyproject.toml --output-file requirements.lock $(ARGS)

.PHONY: clean
clean: ## Remove everything that make has made, the environment included.
	rm -rf $(VENV) .build dist .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache
	find manager tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: supported-python
supported-python:
	@case "$(PYTHON_VERSION)" in \
	  '') echo "make: $(PYTHON) is no Python interpreter; name one with PYTHON=…" >&2; exit 1;; \
	  2.*|3.[0-9]|3.10) echo "make: $(PYTHON) is Python $(PYTHON_VERSION), but 3.11 or newer is needed;" \
	    "name another one with PYTHON=…" >&2; exit 1;; \
	esac

$(READY): requirements.lock pyproject.toml | supported-python $(filter $(OWN_UV),$(UV))
	@echo "make: Python $(PYTHON_VERSION) environment in $(VENV) ..." >&2
	@set -eu; \
	base=$$($(PYTHON) -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'); \
	version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true); \
	if [ "$$version" != "$(PYTHON_VERSION)" ]; then \
	  rm -rf $(VENV); \
	  $(UV) venv --quiet --python "$$base" $(VENV); \
	fi; \
	rm -f $(VENV)/.ready-*; \
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock; \
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

$(OWN_UV): | supported-python
	@echo "make: there is no uv; installing it into .build/uv ..." >&2
	@rm -rf .build/uv
	@$(PYTHON) -m venv .build/uv || { \
	  echo "make: $(PYTHON) cannot make environments; install uv, or the venv module" \
	    "(Debian, Ubuntu: apt-get install python3-venv)" >&2; rm -rf .build/uv; exit 1; }
	@.build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
