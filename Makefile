# The project's verbs. Each sets up what it needs, once: `make demo` and `make test` work in a fresh
# clone with nothing but Python >= 3.11 (and pip's access to a package index on the first run).
#
#   make setup             create .venv with the package and what the tests need
#   make demo              write a story with the bundled model
#   make serve             serve the bundled model at http://127.0.0.1:8000, with OpenAI's endpoints
#   make lint              ruff, mypy and typos
#   make test              the default suite: kernels interpreted, kernels on a generic CPU, everything compiled
#   make test-long         the property tests with 20 times as many examples, and 10,000 requests in a row
#   make test-interpreted  kernel tests as plain Python (NUMBA_DISABLE_JIT=1)
#   make notebooks         execute every notebook in place, with the seconds that each took
#   make bench             measure every kernel against the machine's limits, rewrite the README table, draw plots
#   make docs              regenerate what is generated in the docs, check every link, build the site into site/
#
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo serve lint test test-long test-interpreted notebooks bench docs

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

help:
	@sed -n 's/^#   make /make /p' Makefile

# ---- set-up: an environment, and one stamp per set of extras; pyproject.toml makes a stamp stale ----

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "make: creating $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV) && exit 0; \
	        echo "make: '$$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	        rm -rf $(VENV); exit 2; \
	    fi; \
	done; \
	echo "make: Python >= 3.11 is needed and none was found on PATH; try: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 2

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "make: installing pace-nb into $(VENV)"
	@$(PIP_INSTALL) --editable . && touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "make: installing pace-nb[$*] into $(VENV)"
	@$(PIP_INSTALL) --editable '.[$*]' && touch $@

# ---- verbs ------------------------------------------------------------------------------------------

setup: $(VENV)/.installed-test
	@echo "make: ready; $(BIN)/pace-nb --help"

demo: $(VENV)/.installed
	@$(BIN)/pace-nb generate "Once upon a time" --stats

serve: $(VENV)/.installed-server
	@$(BIN)/pace-nb serve

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos

# The three runs of the kernel tests: as plain Python, for a CPU without AVX, for this CPU (in the whole suite).
test: $(VENV)/.installed-test
	NUMBA_DISABLE_JIT=1 $(PYTEST) -q tests/kernels
	NUMBA_CPU_NAME=generic $(PYTEST) -q tests/kernels
	$(PYTEST) -q

test-long: $(VENV)/.installed-test
	PACE_NB_TEST_LONG=1 $(PYTEST) -q -o faulthandler_timeout=1800 tests/kernels/test_bf16.py tests/engine tests/kv_cache tests/models tests/openai_api tests/e2e/test_any_history.py tests/e2e/test_soak.py tests/e2e/test_speculation_families.py tests/server/test_frames.py tests/server/test_service.py tests/server/test_wire.py tests/test_*.py

test-interpreted: $(VENV)/.installed-test
	NUMBA_DISABLE_JIT=1 $(PYTEST) -q tests/kernels

notebooks: $(VENV)/.installed-notebooks
	@$(BIN)/python notebooks/execute.py

bench: $(VENV)/.installed-test
	@for bench in bench/kernels/bench_*.py; do \
	    $(BIN)/python -m "bench.kernels.$$(basename "$$bench" .py)" || exit 1; done
	$(BIN)/python bench/readme_table.py
	$(BIN)/python -m bench.plots

docs: $(VENV)/.installed-test $(VENV)/.installed-docs
	$(BIN)/python bench/readme_table.py
	$(PYTEST) -q tests/architecture/test_docs.py tests/architecture/test_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "make: open site/index.html"
