.PHONY: test test-fast lint setup

# Two processes; the tests of a file stay together, as some share a port or a finished run.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
LONGEST_FIRST = tests/test_readme.py tests/pretrain/test_run.py tests/pretrain/test_engine.py tests/test_hostfile.py

test: lint
	$(PYTEST) $(LONGEST_FIRST) tests

test-fast: lint
	$(PYTEST) -m "not slow"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup:
	./setup.sh dev
