PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint docs clean

install: $(VENV)/.installed  ## create .venv with everything

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,tensorboard]"
	touch $@

demo: install  ## tune the built-in model on the built-in task, with forward passes alone
	$(BIN)/zo-opt train $(ARGS)

test: install  ## the whole suite
	$(BIN)/python -m pytest --numprocesses auto --quiet

lint: install  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: install  ## the site, into build/site; whatever mkdocs warns of is an error
	$(BIN)/python docs/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf $(VENV) build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
