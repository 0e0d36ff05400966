# make demo   train on real digits with a loss that compiles on the fly
# make test   the tests
# make bench  speed and memory, as ratios
# make lint   what CI checks of style and types
# make gpu    all that needs a GPU: tests, compute-sanitizer, benches
#
# Everything lives in .venv. Another torch: make demo TORCH="torch" (the default is the one tested).

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCHES ?=
GPU_PYTHON ?=  # one that has a torch with CUDA; by default .venv, with TORCH

BIN := .venv/bin

.PHONY: demo test bench lint gpu clean

demo: .venv/installed
	$(BIN)/python -m ops demo $(DEMO_ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCHES)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(if $(strip $(GPU_PYTHON)),,.venv/installed)
	.ci/gpu $(or $(strip $(GPU_PYTHON)),$(BIN)/python)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[demo,test]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache jitops_demo.png
