# make demo    set everything up and run the bundled dataset through the bundled model
# make test    set everything up and run all checks and tests
# The rest are the pieces of these two.

# The folders jobs, workers and datasets must not be importable by accident.
export PYTHONSAFEPATH := 1

# Where Python is told to keep no bytecode, each of the thousands of processes of a test run compiles everything anew.
export PYTHONDONTWRITEBYTECODE :=

UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
BIN := .venv/bin
PYTEST := $(BIN)/pytest
# Unit tests share nothing; some wait, so there is one process more than a small machine has cores. The others wait for
# processes: five files at a time; a file's tests stay in one process, because they share its server. The longest files
# come first (tests/conftest.py), so that none runs alone at the end.
UNIT := -n 3 --dist worksteal
OTHERS := -n 5 --dist loadfile --no-loadscope-reorder

.PHONY: demo test setup lint types docs unit coverage integration slow faults benchmark build release matrix clean

demo: setup
	$(BIN)/promptmill run datasets/ad_comments.jsonl --task datasets/ad_comments.task.yaml --model demo

test: setup lint types docs unit integration

setup: .venv/.ready

# llama-cpp-python is compiled: about 3 minutes on 2 cores the first time, then it comes from uv's cache.
.venv/.ready: pyproject.toml uv.lock
	@command -v $(UV) >/dev/null || { python3 -m venv .uv && .uv/bin/pip install --quiet uv; }
	$(UV) sync --frozen --extra mlx --extra api --group docs --group models
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

# The documentation site, in site/.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: setup
	$(PYTEST) $(UNIT) tests/unit

# The unit tests again, with the share of branches that they reach. It takes twice as long: not part of make test.
coverage: setup
	$(PYTEST) $(UNIT) tests/unit --cov --cov-report=term:skip-covered

integration: setup
	$(PYTEST) $(OTHERS) tests/integration tests/api tests/faults

# Where the time of a test run goes.
slow: setup
	$(PYTEST) $(OTHERS) --durations=50 tests

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

# A wheel and an sdist of the newest tag, checked in a new environment. docs: CONTRIBUTING.md.
release: setup
	rm -rf dist
	$(UV) build
	UV=$(UV) $(BIN)/python tools/check_release.py dist

# The unit tests on each Python that the package names. uv fetches interpreters; one that it cannot fetch is named.
matrix:
	@for version in 3.11 3.12 3.13; do \
		if ! $(UV) python find --quiet $$version >/dev/null 2>&1 && ! $(UV) python install --quiet $$version; then \
			echo "Python $$version: not tested, no interpreter is at hand and none can be fetched"; continue; \
		fi; \
		echo "Python $$version"; \
		UV_PROJECT_ENVIRONMENT=.matrix/$$version $(UV) sync --quiet --frozen --python $$version --extra mlx --extra api || exit 1; \
		.matrix/$$version/bin/pytest -n 2 --dist loadfile -q tests/unit || exit 1; \
	done

clean:
	rm -rf .venv .uv .matrix site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
