# make run [ARGS="key=value …"]   set up .venv and run the main job
# make test                        set up, lint, check types, test
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: run test lint bench

run: $(INSTALLED)
	$(BIN)/lightning-mnn $(ARGS)

test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadgroup $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $(ARGS)

$(INSTALLED): pyproject.toml lightning_mnn/jobs/hydra_plugin.py # which an editable install copies
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
