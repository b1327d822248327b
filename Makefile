PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# the CPU build of torch where it is offered, so that nobody without a GPU downloads CUDA
TORCH  ?= torch==2.13.0
# which transformers the tests see
TRANSFORMERS ?= transformers<6

help:             ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/demo        ## quantize a real BERT, check it, time it, save it, load it: one table, one report
	$(BIN)/python -m qtk demo

test: $(VENV)/dev         ## the test suite, no GPU needed
	$(BIN)/python -m pytest -n auto

fidelity: $(VENV)/dev     ## the slow tests: accuracy of real models
	$(BIN)/python -m pytest -m slow

wheel: $(VENV)/dev        ## the built wheel, tested from a folder without its sources
	.ci/wheel $(abspath $(BIN))/python

lint: $(VENV)/dev         ## format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy qtk kernels/qtk_kernels benchmarks tests/gpu

gpu-gate: $(VENV)/dev     ## every GPU launch, compiled without a GPU by the oldest and the newest triton
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/triton-oldest triton==3.6.0
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/triton-newest triton
	PYTHONPATH=$(VENV)/triton-oldest:.:kernels $(BIN)/python -m tests.kernels.jit_gate
	PYTHONPATH=$(VENV)/triton-newest:.:kernels $(BIN)/python -m tests.kernels.jit_gate

bench: $(VENV)/dev        ## speed, into benchmarks/results/ and the README
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks.speed.cpu_serving
	$(BIN)/python -m benchmarks.speed.quantize
	$(BIN)/python -m benchmarks.speed.cpu_profile
	$(BIN)/python -m benchmarks.readme_tables

clean:            ## removes the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info demo-out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"

$(VENV)/demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]" "$(TRANSFORMERS)"
	touch $@

.PHONY: help demo test fidelity wheel lint gpu-gate bench clean
.DEFAULT_GOAL := help
