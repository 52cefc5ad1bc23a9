# Everything a checkout can do. `make` alone lists it. Needs Python >= 3.11 with its C headers, a C compiler, make.
#
#   make test PYTHON=python3.12 VENV=.venv312      another Python, in an environment of its own
#   make test ARGS='tests/frame -k vectors'        whatever pytest should be told

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CC ?= cc

PY := $(VENV)/bin/python
# pip is quiet, and does not talk about its own next version.
PIP := $(PY) -m pip --disable-pip-version-check -q

SOURCES := $(wildcard zmqcore/*.pyx zmqcore/*.pxd) setup.py
COMPILED = $(patsubst zmqcore/%.pyx,zmqcore.%,$(wildcard zmqcore/*.pyx))

.PHONY: help
help:  ## this list
	@echo 'zmqcore: brokerless RPC over ZeroMQ. Each target does its own set-up; start with `make demo`.'
	@echo
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)$$/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{ printf "  make %-13s %s\n", $$1, $$2 }'
	@echo
	@echo '  PYTHON=python3.12   the Python to make the environment with (now: $(PYTHON))'
	@echo '  VENV=.venv312       where to make it (now: $(VENV))'
	@echo "  ARGS='...'          passed on to demo, pytest or the benchmarks"

# -- the environment ------------------------------------------------------------------------------------
# Three stamps: what is installed to run (changes with pyproject.toml), what is compiled (changes with the
# sources), and the tools for tests, checks and benchmarks, which `make demo` does not need.

.PHONY: venv
venv: $(VENV)/.built  ## make .venv with zmqcore built and installed in it; again, only what has changed

# A PYTHON that was asked for must not be ignored because there is an environment of another version.
.PHONY: same-python
same-python: | $(PY)
	@[ '$(origin PYTHON)' = file ] || \
	  [ "$$($(PYTHON) -c 'import sys; print(sys.version)')" = "$$($(PY) -c 'import sys; print(sys.version)')" ] || { \
	  echo '$(VENV) was made with another Python than $(PYTHON). Add VENV=<another directory>, or `make clean` first' >&2; exit 1; }

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "zmqcore needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo '$(PYTHON) cannot make an environment. On Debian and Ubuntu: apt-get install python3-venv python3-dev gcc' >&2; exit 1; }

# An editable install compiles in place; the .so files beside the sources are what the checkout imports.
$(VENV)/.installed: pyproject.toml setup.py MANIFEST.in | $(PY) same-python
	@echo 'installing zmqcore and what it needs into $(VENV); compiling takes a minute or more ...'
	@$(PIP) install 'pip>=23.1' 'setuptools>=77' 'Cython>=3.1'
	@$(PIP) install --no-build-isolation -e '.[cli,numpy]'
	@touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.installed
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

# zmqcore is there already, so pip takes from it only the list of what the extra names.
$(VENV)/.tools: $(VENV)/.built pyproject.toml
	@if [ ! -e $@ ] || [ pyproject.toml -nt $@ ]; then \
	  echo 'installing the tools for tests, checks and benchmarks into $(VENV) ...'; \
	  $(PIP) install 'zmqcore[dev]'; fi
	@touch $@

# -- what it is for -------------------------------------------------------------------------------------

.PHONY: demo test bench
demo: $(VENV)/.built  ## 4 workers analyse the standard library by RPC, one is killed, every result is checked
	@$(VENV)/bin/zmqcore demo $(ARGS)

test: $(VENV)/.tools  ## every test; ARGS='tests/frame -k vectors' for some
	@$(PY) -m pytest $(ARGS)

bench: $(VENV)/.tools  ## benchmarks and instruction counts beside this machine's baseline: fails where one is slower
	@$(PY) bench/regression.py $(ARGS)

# What it is measured beside lives in an environment of its own; zmqcore comes from this checkout.
VENV_PEERS ?= .venv-peers
PEERS_PIP := $(VENV_PEERS)/bin/python -m pip --disable-pip-version-check -q

$(VENV_PEERS)/.installed: bench/peers/requirements.txt | $(PY)
	@$(PY) -m venv $(VENV_PEERS)
	@echo 'installing what zmqcore is measured beside into $(VENV_PEERS) ...'
	@$(PEERS_PIP) install -r $< || sed 's/#.*//' $< | while read -r one; do \
	  [ -z "$$one" ] || $(PEERS_PIP) install "$$one" || echo "left out: $$one cannot be installed" >&2; done
	@touch $@

.PHONY: bench-peers
bench-peers: $(VENV)/.built $(VENV_PEERS)/.installed  ## beside gRPC, NATS, RPyC and others (8 minutes; ARGS=--quick: 2)
	@PYTHONPATH=$(CURDIR) $(VENV_PEERS)/bin/python bench/against.py $(ARGS)

# What to compare with where there is no baseline, or in doubt.
BASE ?= origin/main

.PHONY: bench-compare
bench-compare: $(VENV)/.tools  ## the same on BASE=origin/main first, which is then the baseline
	@rm -rf build/base && mkdir -p build/base && git archive $(BASE) | tar xf - -C build/base
	@cd build/base && $(abspath $(PY)) setup.py -q build_ext --inplace
	@# The same benchmarks for both: what BASE does not have is left out.
	@$(PY) bench/regression.py --package build/base --save build/bench/base.json $(ARGS)
	@$(PY) bench/regression.py --baseline build/bench/base.json $(ARGS)

SOAK_SECONDS ?= 600

.PHONY: soak
soak: $(VENV)/.built  ## everything at once for SOAK_SECONDS=600: memory must stop growing, no descriptor may be left
	@$(PY) bench/soak.py --seconds $(SOAK_SECONDS) $(ARGS)

# -- the checks -----------------------------------------------------------------------------------------

.PHONY: lint stubtest
lint: $(VENV)/.tools stubtest  ## formatting, style, types, stubs against the built modules, spelling, layers, links
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	@# it runs pycodestyle by name
	PATH=$(abspath $(VENV)/bin):$$PATH cython-lint zmqcore
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell
	$(PY) -m pytest -q tests/test_layering.py tests/docs/test_links.py

stubtest: $(VENV)/.tools  ## of these only the stubs against the built modules
	$(PY) -m mypy.stubtest --mypy-config-file pyproject.toml --allowlist .ci/stubtest-allow --ignore-unused-allowlist $(COMPILED)

# -- the documentation ----------------------------------------------------------------------------------

.PHONY: docs
docs: $(VENV)/.tools  ## build/site: the documentation as a site; a warning is an error
	@# All anew (-E -a): the navigation stands on every page, and docstrings come from compiled modules, too.
	@$(PY) -m sphinx -W --keep-going -q -E -a -c docs -d build/doctrees . build/site
	@echo 'build/site/index.html'

# -- the wheel ------------------------------------------------------------------------------------------

# The Pythons to make wheels for, one after the other.
PYTHONS ?= $(PYTHON)

.PHONY: wheel
wheel:  ## dist/: the sdist, and from it a tested wheel (manylinux where possible); PYTHONS='python3.11 python3.12' for more
	@.ci/wheel $(PYTHONS)

# -- sanitizers -----------------------------------------------------------------------------------------
# A copy of the sources, because an instrumented .so beside them would be what everything else imports.

ASAN_TREE := build/asan
ASAN_LIB = $(shell $(CC) -print-file-name=libasan.so)

.PHONY: asan
asan: $(VENV)/.tools  ## the tests of the wire format on a build with the address and undefined-behaviour sanitizers
	@[ -e '$(ASAN_LIB)' ] || { echo '$(CC) has no libasan.so; install gcc with its sanitizers' >&2; exit 1; }
	@mkdir -p $(ASAN_TREE) && rm -rf $(ASAN_TREE)/tests
	@tar cf - --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml LICENSE $(wildcard README.md) zmqcore tests | tar xf - -C $(ASAN_TREE)
	@cd $(ASAN_TREE) && ZMQCORE_ASAN=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	@# Leaks: CPython itself leaves much at exit. pymalloc would hide overruns inside its arenas.
	@cd $(ASAN_TREE) && LD_PRELOAD='$(ASAN_LIB)' PYTHONMALLOC=malloc PYTHONPATH=$(abspath $(ASAN_TREE)) \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ZMQCORE_ASAN=1 \
	  $(abspath $(PY)) -m pytest -p no:cacheprovider $(or $(ARGS),tests/frame $(wildcard tests/unit/test_body.py))

# -- coverage -------------------------------------------------------------------------------------------
# A tree of its own here too: a traced module is many times slower than what everything else should import.

COVERAGE_TREE := build/coverage
COVERAGE_AT_LEAST ?= 90

.PHONY: coverage
coverage: $(VENV)/.tools  ## lines that the tests run: build/coverage/html; fails where Python or Cython is below COVERAGE_AT_LEAST=90
	@$(PY) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { \
	  echo 'make coverage needs Python 3.11 or 3.12: later ones tell of Cython lines through sys.monitoring alone, which coverage.py does not follow into plugins' >&2; exit 1; }
	@# All anew: a tracing build compiles everything anyhow, and what is no longer in the sources would count as not run.
	@rm -rf $(COVERAGE_TREE) && mkdir -p $(COVERAGE_TREE)
	@tar cf - --exclude='*.so' --exclude='zmqcore/*.c' --exclude=__pycache__ setup.py pyproject.toml Makefile $(wildcard *.md *.in) LICENSE zmqcore tests docs bench examples .ci $(wildcard .github) | tar xf - -C $(COVERAGE_TREE)
	@cd $(COVERAGE_TREE) && ZMQCORE_TRACE=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	@# At the root, where every process of the tests finds it, whatever of PYTHONPATH it has been left.
	@cp .ci/quiet_tracing.py $(COVERAGE_TREE)
	@# Left out: what takes real time already, and what runs another copy of the package than the traced one.
	@# The report comes even if a test fails.
	@cd $(COVERAGE_TREE) && failed=0 && \
	  { PYTHONPATH=$$PWD ZMQCORE_TRACE=1 $(abspath $(PY)) -m coverage run -m pytest -p no:cacheprovider -m 'not slow' \
	    --ignore=tests/installed --ignore=tests/test_sdist.py --ignore=tests/docs/test_site.py $(ARGS) || failed=$$?; } && \
	  $(abspath $(PY)) -m coverage combine -q && $(abspath $(PY)) -m coverage html -q -d html && \
	  $(abspath $(PY)) -m coverage report && \
	  for kind in 'Python --omit=*.pyx' 'Cython --include=*.pyx'; do \
	    total=$$($(abspath $(PY)) -m coverage report --format=total "$${kind#* }"); \
	    echo "$${kind%% *}: $$total %"; \
	    [ $$total -ge $(COVERAGE_AT_LEAST) ] || { echo "  less than COVERAGE_AT_LEAST=$(COVERAGE_AT_LEAST)" >&2; failed=1; }; done && \
	  exit $$failed

.PHONY: clean
clean:  ## remove what the other targets have made
	rm -rf $(VENV) $(VENV_PEERS) build dist *.egg-info zmqcore/*.so zmqcore/*.c .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find zmqcore tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
