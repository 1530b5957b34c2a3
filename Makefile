# Every target makes .venv first, once, and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo train test check bench clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python -m experiments.ar_mnist --run runs/demo --steps 1000

train: install
	$(BIN)/python -m experiments.ar_mnist

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: install
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.start_up

clean:
	rm -rf .venv .pytest_cache .ruff_cache runs
