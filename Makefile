PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test docs notebooks lint format clean

## The main job: the deep autoencoder on generated curves, three optimizers.
demo: $(VENV)/installed
	$(BIN)/python -m benchmarks.autoencoder --output out

## The suite, doctests included; `pytest -m slow` runs whole commands of benchmarks.
test: $(VENV)/installed
	$(BIN)/pytest -n auto

## The documentation site, in site/; a warning or a dead link is an error.
docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

## All notebooks anew, outputs included: about ten minutes on 2 cores.
notebooks: $(VENV)/installed
	$(BIN)/python -m notebooks.execute

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out site dist .pytest_cache
