# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs lint test test-fast format clean

.venv/installed: pyproject.toml benchmarks/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable benchmarks --constraint constraints.txt
	touch $@

demo: .venv/installed
	$(BIN)/quadstep-bench demo

# The same checks before a commit (.pre-commit-config.yaml) and in `make test`.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest

# All tests but the slow ones, and no lint.
test-fast: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

# The tests build it, too, and treat warnings as errors.
docs: .venv/installed
	$(BIN)/mkdocs build --strict

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv
