# `make test` and `make demo` need only Python 3.11+ with pip and venv: they build .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2
RUN := $(abspath $(BIN))
MYPY = cd build/typecheck && $(RUN)/mypy --config-file $(CURDIR)/pyproject.toml \
	--cache-dir $(CURDIR)/.mypy_cache --python-executable $(RUN)/python -p ppl_diffusion

# torch and the BLAS below it start one thread per core in every worker unless told otherwise.
export OMP_NUM_THREADS ?= 1

# Tests start Python many times: what it compiles is kept, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test lint style links floors typecheck format notebooks docs figures bench slow gpu ray dist clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed ## create .venv and install the package with its tested versions

# torch goes first and alone, so that no later requirement can choose another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: install ## design yeast promoters with the shipped prior, in about a minute
	OMP_NUM_THREADS=$${DEMO_THREADS:-2} OMP_WAIT_POLICY=passive $(BIN)/ppl-diffusion design yeast-promoter --out runs/demo --force

# mypy takes half a minute without its cache, so it runs beside the tests; what it finds comes last.
test: style floors ## lint, type-check and run the tests; fails if one of them does
	@($(MYPY)) >build/typecheck.log 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m 'not slow and not gpu and not ray'; \
	tests=$$?; wait $$types || { cat build/typecheck.log; exit 1; }; exit $$tests

lint: style typecheck floors ## ruff, mypy, and the floors between the rooms

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# models/ and inference/ are sub-packages only after installation, so mypy and import-linter read a
# tree of links that has the shape of the installed package.
links: install
	@rm -rf build/typecheck && mkdir -p build/typecheck/ppl_diffusion
	@ln -s $(CURDIR)/ppl_diffusion/* build/typecheck/ppl_diffusion/
	@ln -s $(CURDIR)/models $(CURDIR)/inference build/typecheck/ppl_diffusion/

# An upward import, or a circle: pyproject.toml says which room stands on which.
floors: links
	cd build/typecheck && $(RUN)/lint-imports $(CURDIR)/pyproject.toml --no-cache

typecheck: links
	$(MYPY)

format: install ## rewrite the sources with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: install ## write each notebooks/*.ipynb from its .py twin
	$(BIN)/jupytext --quiet --to ipynb --update notebooks/*.py

docs: $(VENV)/.installed-docs ## build the HTML documentation in build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo 'open build/docs/index.html'

figures: demo ## draw the picture of the README anew, from the demo
	cp runs/demo/plots/ancestry.png docs/figures/demo.png

bench: install ## the quick form of every benchmark
	@set -e; for file in benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); echo "== $$name"; \
		if [ $$name = pbm ] && [ -z "$$PPL_DIFFUSION_DATA" ]; then \
			echo 'left out: needs PPL_DIFFUSION_DATA'; continue; fi; \
		$(BIN)/python -m benchmarks.$$name --quick; done

slow: install ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

gpu: install ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu

ray: install ## the tests that start Ray, Dask or submitit, where they are installed
	$(BIN)/python -m pytest -m ray

dist: install ## build the wheel and the source archive
	$(BIN)/python -m build

clean: ## remove what was built, not the environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
