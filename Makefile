# make demo      train on real digits with a loss that compiles on the fly
# make test      the tests, without the slow ones
# make test-all  all tests
# make bench     speed and memory, as ratios, and the README's chart
# make docs      the site, into build/site
# make lint      what CI checks of style and types
# make gpu       all that needs a GPU: tests, compute-sanitizer, benches
#
# Everything lives in .venv. Another torch: make demo TORCH="torch" (the default is the one tested).

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
WORKERS ?= auto
DEMO_ARGS ?=
BENCHES ?=
GPU_PYTHON ?=  # one that has a torch with CUDA; by default .venv, with TORCH

BIN := .venv/bin
# Of this torch: with another one, it is installed anew.
INSTALLED := .venv/with-$(subst /,_,$(subst $() $(),_,$(TORCH)))

.PHONY: demo test test-all bench docs lint gpu clean

demo: $(INSTALLED)
	$(BIN)/python -m ops demo $(DEMO_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not thorough" $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCHES)
	$(BIN)/python -m benchmarks.plot

docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --fresh-env --quiet docs build/site
	@echo "The site: build/site/index.html"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(if $(strip $(GPU_PYTHON)),,$(INSTALLED))
	.ci/gpu $(or $(strip $(GPU_PYTHON)),$(BIN)/python)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	rm -f .venv/with-* .venv/dev .venv/docs .venv/peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[demo,test]"
	touch $@

.venv/dev: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

.venv/peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[peers]"
	touch $@

.venv/docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache jitops_demo.png
