# make run [ARGS="key=value …"]   set up .venv and run the main job
# make test                        set up, lint, check types, test
# make test-newest                 the same in .venv-newest, with releases that pyproject.toml does not allow yet
# make docs                        build the documentation into site/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINNED := torch torchvision pytorch-lightning lightning hydra-core wandb wandb-workspaces zarr

.PHONY: run test test-newest lint bench docs

run: $(INSTALLED)
	$(BIN)/lightning-mnn $(ARGS)

test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadgroup $(ARGS)

test-newest:
	$(MAKE) VENV=.venv-newest .venv-newest/.installed
	.venv-newest/bin/python -m pip install --quiet --upgrade --pre $(PINNED)
	$(MAKE) VENV=.venv-newest test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $(ARGS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml lightning_mnn/launchers/hydra_plugin.py # which an editable install copies
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs]"
	touch $@
