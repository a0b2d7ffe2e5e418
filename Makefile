# One command each. Every target makes the environment it needs in .venv; a second call finds it made.
#   make demo   the main job on real data        make test     all tests, doctests and lint
#   make bench  the comparison with the peers    make doctor   what runs here and, if not, why
#
# PYTHON=python3.12 picks the interpreter; TORCH_ARGS goes to the install of torch alone (an index of CPU-only
# wheels, for instance), which otherwise comes from wherever pip is configured to look.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What the editable install takes a snapshot of: the library, and which folders are packages.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/* fastwm/__init__.py fastwm/*/__init__.py)

.PHONY: demo test bench lint format doctor clean
.DEFAULT_GOAL := test

$(VENV)/.torch: constraints.txt
	@test -x $(BIN)/python || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastwm needs Python 3.11 or newer")' && \
	  echo "creating $(VENV)" && $(PYTHON) -m venv $(VENV); }
	@echo "installing torch and the build tools"
	@$(PIP) install -c constraints.txt $(TORCH_ARGS) torch==2.13.0
	@$(PIP) install -c constraints.txt scikit-build-core cmake ninja
	@touch $@

# torch comes first and the build sees it (--no-build-isolation): the C++ library builds against it.
$(VENV)/.%: $(VENV)/.torch $(SOURCES)
	@echo "installing fastwm[$*]"
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m fastwm demo $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m fastwm bench $(ARGS)

doctor: $(VENV)/.demo
	$(BIN)/python -m fastwm doctor

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# pytest comes last, so that its closing line does; a red lint does not hide what the tests say, but fails.
test: $(VENV)/.test
	@lint=0; $(MAKE) --no-print-directory lint || lint=1; \
	$(BIN)/python -m pytest $(ARGS) && exit $$lint

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
