.PHONY: test test-fast lint setup

# Two processes; the tests of a file stay together, as some share a port or a finished run.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

test-fast: lint
	$(PYTEST) -m "not slow"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup:
	./setup.sh dev
