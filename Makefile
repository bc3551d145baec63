# `make demo` and `make test` do all the set-up themselves; both can be repeated.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := all,test,bench,lint
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test test-compile test-gpu bench lint clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/installed ## create .venv and install everything into it

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

demo: install ## unlearn fictitious authors on this machine: report and pictures in out/demo
	rm -rf out/demo
	$(BIN)/soul demo --output out/demo

test: install ## kernels in the interpreter, references, everything else; no GPU needed
	$(PYTEST) --all-extras

test-compile: install ## every kernel compiled for sm_80, sm_90, sm_100 and gfx942; no GPU needed
	TRITON_INTERPRET=0 $(PYTEST) tests/test_compile.py

test-gpu: ## the same tests on a GPU, with the Python that is active; what test-compile does needs none
	TRITON_INTERPRET=0 $(PYTHON) -m pytest --ignore tests/test_compile.py

bench: install ## time the ops on what there is
	$(BIN)/python -m bench

lint: install ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove .venv and all that was made
	rm -rf .venv out build *.egg-info .pytest_cache .ruff_cache
