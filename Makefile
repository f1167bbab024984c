# Every target sets up what it needs; `make help` lists them.
python := .venv/bin/python
# Test files that run side by side; each distributed test starts up to four ranks of its own.
WORKERS ?= 2

.PHONY: help setup quickstart test test-fast lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## find or get Python 3.12, create .venv, install pinned dependencies, build the extension
	@scripts/setup.sh

quickstart: setup  ## train a TopK and a dense language model on Shakespeare, compare and sample them
	@$(python) examples/quickstart/run.py

test: setup  ## the whole test suite, two files at a time (pass options with ARGS=...)
	@$(python) -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-fast: setup  ## the tests that take seconds
	@$(python) -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile $(ARGS)

lint: setup  ## formatting, lint and types
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m pyright

format: setup  ## rewrite the sources as ruff wants them
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

bench: setup  ## the benchmarks; each prints a table with machine, versions, medians and ratios
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(python) $$script || exit 1; done

clean:  ## remove what make made (kernels, caches, runs/quickstart), but for .venv
	rm -rf build dist *.egg-info runs/quickstart .pytest_cache .ruff_cache .hypothesis
	find topk_megatron tools tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
	find topk_megatron -name '*.so' -delete
	rm -f .venv/.setup
