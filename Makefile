# Set-up is part of every target: a fresh machine needs Python 3.11 or later with venv, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
# Processes in which `make test` runs tests, with one thread each: one more than cores, since some wait for the test Hub.
WORKERS ?= 3
# The rooms as they are installed, for tools that read sources.
TREE = rm -rf build/tree && mkdir -p build/tree && cp -rs $(CURDIR)/mxd build/tree/mxd \
	&& ln -s $(CURDIR)/modeling_mxd $(CURDIR)/hub_cards $(CURDIR)/trainers build/tree/mxd/
PYTEST = -m pytest --numprocesses $(WORKERS)
# Python keeps bytecode, though the environment says not to: without it every process compiles all modules anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test tasks coverage oldest quality docs dist format clean

demo: .venv/installed  ## decompose the embedded model with the embedded text (4 to 5 minutes on 2 cores)
	$(BIN)/mxd decompose --output demo-output --overwrite

test: .venv/installed-dev  ## the whole test suite
	$(BIN)/python $(PYTEST)

tasks: .venv/installed-dev  ## the tests that need lm-evaluation-harness or TRL, which are installed for them
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[tasks]' trl
	$(BIN)/python $(PYTEST) tests/hub_cards/test_tasks.py tests/test_snippets.py -k "test_tasks or finetune"

coverage: .venv/installed-dev  ## line and branch coverage of modeling_mxd and trainers by their own tests, at least 90 %
	$(BIN)/python $(PYTEST) tests/modeling_mxd tests/trainers --ignore tests/modeling_mxd/test_architectures.py --cov

oldest: .venv-oldest/installed  ## the trainers and the commands with the oldest supported releases
	.venv-oldest/bin/python $(PYTEST) tests/trainers tests/cli tests/jobs

quality: .venv/installed-dev  ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TREE)
	$(BIN)/mypy

docs: .venv/installed-dev  ## the documentation site, in build/site; a broken link or a missing docstring is an error
	$(TREE)
	$(BIN)/python scripts/build_docs.py

dist: $(BIN)/python  ## wheel and source distribution in dist/, checked; TAG=v1.2.3 checks their version too
	$(BIN)/pip install --quiet build twine
	rm -rf dist && $(BIN)/python -m build && $(BIN)/twine check --strict dist/*
	test -z "$(TAG)" || test -f dist/mxd-$(TAG:v%=%)-py3-none-any.whl

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest demo-output build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/installed

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[probing]' \
		peft pytest pytest-timeout pytest-xdist
	touch $@
