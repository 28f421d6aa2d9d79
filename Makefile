.PHONY: test test-all test-fast test-old lint setup setup-all

# Two processes; the tests of a file stay together, as some share a port or a finished run.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What depends on the processor: attention, dropout, gradients, resuming, and the first run.
OLD_PROCESSOR = ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

test: lint
	$(PYTEST) -m "not heavy"

# The tests that `make test` leaves out, then some of the others as on an old processor.
test-all: setup-all
	$(PYTEST) -m heavy
	$(MAKE) test-old

test-old: setup
	$(OLD_PROCESSOR) $(PYTEST) -m "old_processor and not heavy"

test-fast: lint
	$(PYTEST) -m "not slow and not heavy"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --num-workers 2

setup:
	./setup.sh dev

setup-all:
	./setup.sh all
