# make demo    set everything up and run the bundled dataset through the bundled model
# make test    set everything up and run all checks and tests
# The rest are the pieces of these two.

# The folders jobs, workers and datasets must not be importable by accident.
export PYTHONSAFEPATH := 1

# Where Python is told to keep no bytecode, each of the thousands of processes of a test run compiles everything anew.
export PYTHONDONTWRITEBYTECODE :=

UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
BIN := .venv/bin
# A file's tests stay in one process: they share its server.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

.PHONY: demo test setup lint types unit integration slow faults benchmark build clean

demo: setup
	$(BIN)/promptmill run datasets/ad_comments.jsonl --task datasets/ad_comments.task.yaml --model demo

test: setup lint types unit integration

setup: .venv/.ready

# llama-cpp-python is compiled: about 3 minutes on 2 cores the first time, then it comes from uv's cache.
.venv/.ready: pyproject.toml uv.lock
	@command -v $(UV) >/dev/null || { python3 -m venv .uv && .uv/bin/pip install --quiet uv; }
	$(UV) sync --frozen --extra mlx --extra api
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

unit: setup
	$(PYTEST) tests/unit

integration: setup
	$(PYTEST) tests/integration tests/api tests/faults

# Where the time of a test run goes.
slow: setup
	$(PYTEST) --durations=50 tests

# Every fault of tests/faults/README.md once, then a soak of 10 minutes; SEEDS=10 for ten of each.
SEEDS := 1
MINUTES := 10
faults: setup
	PYTHONSAFEPATH= $(BIN)/python -m tests.faults.run --seeds $(SEEDS)
	PYTHONSAFEPATH= $(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

# Ratios against peers on this machine; not part of make test. tests/benchmarks/README.md says more.
benchmark: setup
	PYTHONPATH=tests/benchmarks $(BIN)/python tests/benchmarks/pipeline.py

build: setup
	$(UV) build

clean:
	rm -rf .venv .uv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
