.PHONY: test test-fast lint setup

test: lint
	.venv/bin/python -m pytest

test-fast: lint
	.venv/bin/python -m pytest -m "not slow"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup:
	./setup.sh dev
