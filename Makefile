# Every target sets up what it needs; `make help` lists the targets.
python := .venv/bin/python
# Test files that run at the same time; each distributed test starts up to four ranks of its own.
WORKERS ?= 2

.PHONY: help setup quickstart paper paper-fast docs audit test test-fast lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## find or fetch Python 3.12, create .venv, install pinned dependencies, build the extension
	@scripts/setup.sh

quickstart: setup  ## train a TopK LM and its dense twin on Shakespeare, compare them, look inside
	@$(python) examples/quickstart/run.py

paper: setup  ## run the paper's experiments at laptop scale: an hour and a half, resumable
	@$(python) examples/paper/run.py

paper-fast: setup  ## run them with four variants and a few steps, to see that every part works
	@$(python) examples/paper/run.py --fast

docs: setup  ## build the documentation site in build/site, with warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

audit:  ## compare the pins with the advisory database (needs pip-audit and a network)
	pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

test: setup  ## run the whole test suite, and tests/gpu where there is one (pass options with ARGS=...)
	@WORKERS=$(WORKERS) scripts/test.sh $(ARGS)

test-fast: setup  ## run the tests that take seconds
	@WORKERS=$(WORKERS) scripts/test.sh -m "not slow" $(ARGS)

lint: setup  ## check formatting, lint and types
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m pyright

format: setup  ## format the sources with ruff
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

bench: setup  ## run the benchmarks; each prints a table with machine, versions, medians and ratios
	@for script in topk_mask.py train_step.py record.py report.py scaling_model.py plan_memory.py "parallel.py bytes"; do \
		echo "== $$script"; $(python) benchmarks/$$script || exit 1; done

clean:  ## remove what make made (kernels, caches, runs/quickstart), except .venv
	rm -rf build dist *.egg-info runs/quickstart .pytest_cache .ruff_cache .hypothesis
	find topk_megatron tools tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
	find topk_megatron -name '*.so' -delete
	rm -f .venv/.setup
