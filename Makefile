# `make demo` and `make test` do all the set-up themselves; both can be repeated.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := all,test,bench,lint,docs,dist
# Of install: "lowest-direct" takes the oldest versions that setup.py admits, for all that it names itself.
RESOLUTION ?= highest
PYTEST := $(BIN)/python -m pytest
# Of chromium: nothing for the superuser.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo --non-interactive)
# Test files are divided among as many processes; what a file sets up is then set up once.
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Of test-gpu: files, and seconds for each.
TESTS ?= $(filter-out tests/kernels/test_compile.py tests/clients/%,$(wildcard tests/test_*.py tests/*/test_*.py))
LIMIT ?= 400

# Also the cases that make test leaves out of tests with many cases, but nothing else that is slow.
EVERY_CASE := --slow -m 'many or not slow'

# Of test-ptx: GPUs to compile for; another version of Triton, in a folder of its own (of test-compile too); more options of
# pytest; files that launch kernels themselves.
TARGETS ?= sm_80 sm_90 sm_100
TRITON ?=
OPTIONS ?=
TESTS_PTX := tests/ptx tests/optim tests/models tests/test_losses.py tests/test_functional.py tests/test_model_loss.py \
    tests/run/test_influence.py tests/run/test_unlearner.py \
    $(filter-out %/test_compile.py %/test_compiled.py %/test_interpreter.py,$(wildcard tests/kernels/test_*.py))

# Of parity: files with tests of layouts; the one that takes longest begins.
LONGEST := tests/distributed/test_torchrun.py
TESTS_PARITY := $(LONGEST) $(filter-out tests/clients/% $(LONGEST),$(shell grep -rlE 'covers.*"(FSDP2|HSDP|TP)"|mark.counts' tests --include='test_*.py'))
# Of test-clients: whose code, and a checkout of locuslab/open-unlearning; without one only its interface is tested.
CLIENTS ?= $(patsubst tests/clients/test_%.py,%,$(wildcard tests/clients/test_*.py))
OPEN_UNLEARNING ?=
TESTS_open_unlearning := tests/integrations/test_integrations.py tests/test_functional.py
TESTS_trl := tests/test_examples.py::test_trl_trains
TESTS_lightning := tests/test_examples.py::test_lightning_module_unlearns

# Of matrix: rows by name (.ci/matrix.py); without any, all.
ROWS ?=

.PHONY: help install demo chromium test test-slow test-all test-cpu matrix parity test-ptx $(TARGETS:%=test-ptx-%) test-compile evidence test-gpu test-clients $(CLIENTS:%=test-client-%) bench lint docs dist clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/installed ## create .venv and install everything into it

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
ifeq ($(RESOLUTION),highest)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
else
	$(BIN)/python -m pip install --quiet 'uv>=0.8'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --resolution $(RESOLUTION) --editable '.[$(EXTRAS)]'
endif
	touch $@

demo: install ## unlearn fictitious authors on this machine: report and pictures in out/demo
	rm -rf out/demo
	$(BIN)/soul demo --output out/demo

chromium: ## the browser in which tests look at reports, by apt where there is none; without it they are skipped
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { $(SUDO) apt-get -qq update && \
	    $(SUDO) apt-get -qq install --yes --no-install-recommends chromium; } || echo 'no Chromium: its tests will be skipped'

test: install ## kernels compiled for a GPU and executed on the CPU, references, everything else; no GPU needed
	$(PYTEST) --all-extras $(PARALLEL)

test-slow: install ## what `make test` leaves out: processes that are started and killed, real data
	$(PYTEST) --all-extras $(PARALLEL) --slow -m slow

test-all: install ## every test
	$(PYTEST) --all-extras $(PARALLEL) --slow

# A newcomer there has no Triton: what is left is the import, references, data, models and the command.
test-cpu: ## where Triton is not to be had (macOS, Windows), with the Python that is active
	$(PYTHON) -m pip install --quiet --editable '.[all,test]'
	$(PYTHON) -m pytest $(PARALLEL) tests/test_losses.py tests/optim/test_optimizer.py tests/data tests/models tests/commands/test_cli.py

matrix: install ## tests in other environments, each in .venv-matrix, and their table in docs/testing.md; ROWS="py310 oldest"
	$(BIN)/python -m pip install --quiet 'uv>=0.8'
	$(BIN)/python .ci/matrix.py $(ROWS)

test-ptx: $(TARGETS:%=test-ptx-%) ## kernels as PTX with every check on; TARGETS="sm_80 sm_90 sm_100", TRITON=3.6, OPTIONS

$(TARGETS:%=test-ptx-%): test-ptx-%: install $(if $(TRITON),.triton/$(TRITON)/installed)
	PYTHONPATH=$(if $(TRITON),.triton/$(TRITON)) $(PYTEST) $(PARALLEL) $(EVERY_CASE) --ptx $* --ptx-strict $(OPTIONS) $(TESTS_PTX)

.triton/%/installed:
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton/$* 'triton==$*.*'
	touch $@

test-compile: install $(if $(TRITON),.triton/$(TRITON)/installed) ## every kernel compiled for sm_80, sm_90, sm_100 and gfx942; no GPU needed; TRITON=3.6
	PYTHONPATH=$(if $(TRITON),.triton/$(TRITON)) TRITON_INTERPRET=0 $(PYTEST) tests/kernels/test_compile.py

# With the version that is installed and with that of GPU machines; the tests hold each against its own file.
evidence: install .triton/3.6/installed ## write anew what the compilers make of the kernels: tests/kernels/compiled_kernels-*.json
	TRITON_INTERPRET=0 $(BIN)/python -m tests.kernels.test_compile
	PYTHONPATH=.triton/3.6 TRITON_INTERPRET=0 $(BIN)/python -m tests.kernels.test_compile

# An error on the device is the end of its process, and a kernel may hang: so a process a file. pytest ends with 5 where a file
# is skipped as a whole.
test-gpu: ## the same tests on a GPU, with the Python that is active, four files at a time; test-compile needs none
	@printf '%s\n' $(TESTS) | TRITON_INTERPRET=0 xargs -P 4 -I FILE sh -c 'report=$$(timeout $(LIMIT) $(PYTHON) -m pytest FILE --slow 2>&1); \
	    status=$$?; printf "%s\nFILE: status $$status\n\n" "$$report"; [ $$status = 0 ] || [ $$status = 5 ]'

# Tests that did not run keep their numbers.
parity: install .venv-clients/deepspeed/installed ## measure how far layouts of processes are from one: tests/distributed/parity.json, docs/layouts.md
	$(PYTEST) --slow --parity -m 'covers or counts' $(PARALLEL) $(TESTS_PARITY)
	.venv-clients/deepspeed/bin/python -m pytest --slow --parity -m covers tests/clients/test_deepspeed.py
	$(BIN)/python -m tests.support.layouts docs/layouts.md

# `make -k` goes on where a client fails.
test-clients: $(CLIENTS:%=test-client-%) ## with other people's code, each in an environment of its own; OPEN_UNLEARNING=checkout

$(CLIENTS:%=test-client-%): test-client-%: .venv-clients/%/installed
	OPEN_UNLEARNING='$(OPEN_UNLEARNING)' .venv-clients/$*/bin/python -m pytest $(EVERY_CASE) tests/clients/test_$*.py $(TESTS_$*)

.venv-clients/%/installed: tests/clients/requirements-%.txt setup.py
	$(PYTHON) -m venv .venv-clients/$*
	.venv-clients/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

bench: install ## time the ops on what there is
	$(BIN)/python -m bench

lint: install ## ruff: rules and formatting; mypy: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## the documentation site, in out/site; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir out/site

dist: install ## source distribution and wheel, in dist, checked for what they hold
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py dist

clean: ## remove .venv, .venv-clients, .venv-matrix and all that was made
	rm -rf .venv .venv-clients .venv-matrix .triton out build dist *.egg-info .pytest_cache .ruff_cache
