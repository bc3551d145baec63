# `make demo` and `make test` do all the set-up themselves; both can be repeated.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := all,test,bench,lint
PYTEST := $(BIN)/python -m pytest
# Of test-gpu: files, and seconds for each.
TESTS ?= $(filter-out tests/test_compile.py,$(wildcard tests/test_*.py))
LIMIT ?= 400

# Of test-clients: whose code, and a checkout of locuslab/open-unlearning; without one only its interface is tested.
CLIENTS ?= $(patsubst tests/clients/test_%.py,%,$(wildcard tests/clients/test_*.py))
OPEN_UNLEARNING ?=
TESTS_open_unlearning := tests/test_integrations.py tests/test_functional.py

.PHONY: help install demo test test-compile test-gpu test-clients $(CLIENTS:%=test-client-%) bench lint clean

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

# An error on the device is the end of its process, and a kernel may hang: so a process a file. pytest ends with 5 where a file
# is skipped as a whole.
test-gpu: ## the same tests on a GPU, with the Python that is active, four files at a time; test-compile needs none
	@printf '%s\n' $(TESTS) | TRITON_INTERPRET=0 xargs -P 4 -I FILE sh -c 'told=$$(timeout $(LIMIT) $(PYTHON) -m pytest FILE 2>&1); \
	    status=$$?; printf "%s\nFILE: status $$status\n\n" "$$told"; [ $$status = 0 ] || [ $$status = 5 ]'

# `make -k` goes on where a client fails.
test-clients: $(CLIENTS:%=test-client-%) ## with other people's code, each in an environment of its own; OPEN_UNLEARNING=checkout

$(CLIENTS:%=test-client-%): test-client-%: .venv-clients/%/installed
	OPEN_UNLEARNING='$(OPEN_UNLEARNING)' .venv-clients/$*/bin/python -m pytest tests/clients/test_$*.py $(TESTS_$*)

.venv-clients/%/installed: tests/clients/requirements-%.txt setup.py
	$(PYTHON) -m venv .venv-clients/$*
	.venv-clients/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

bench: install ## time the ops on what there is
	$(BIN)/python -m bench

lint: install ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove .venv, .venv-clients and all that was made
	rm -rf .venv .venv-clients out build *.egg-info .pytest_cache .ruff_cache
