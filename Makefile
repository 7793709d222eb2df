# Each of demo, test, check and bench makes what it needs: a virtual environment in .venv with the
# versions of constraints.txt. Say PYTHON=... for another interpreter, PIP_ARGS=... for more options
# of pip, ARGS=... for options of the command itself (make demo ARGS="--ranks 2").

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
# Most of what torch brings is never imported, so nothing is compiled ahead.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile \
	-c constraints.txt $(PIP_ARGS)
# The build tool is pinned and installed like everything else, not fetched anew for each build.
EDITABLE := $(PIP) --no-build-isolation
SETUP := Makefile constraints.txt pyproject.toml

.PHONY: demo test check bench clean

demo: .venv/cli.stamp
	$(BIN)/crossdock demo $(ARGS)

bench: .venv/cli.stamp
	$(BIN)/crossdock bench $(ARGS)

test: .venv/dev.stamp
	$(BIN)/python -m pytest $(ARGS)

check: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist src/*.egg-info shim/build shim/src/*.egg-info crossdock-demo.png
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src shim tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "crossdock needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# What runs the demo and the benchmark ...
.venv/cli.stamp: $(SETUP) | $(BIN)/python
	$(PIP) setuptools
	$(EDITABLE) -e '.[cli]'
	@touch $@

# ... and what only development needs: some 200 MB more.
.venv/dev.stamp: .venv/cli.stamp shim/pyproject.toml
	$(EDITABLE) -e '.[dev]' -e ./shim
	@touch $@
