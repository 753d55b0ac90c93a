# One target a job; `make demo` and `make test` set up all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo serve test check lint types browser bench gpu-check clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

setup: $(STAMP)

demo: setup  ## four models on three workers that hold two each; ends with a summary
	$(BIN)/polymux demo

serve: setup  ## the demo models on port 8000, until Ctrl-C
	$(BIN)/polymux serve --config deploy/demo/demo.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/python -m mypy

test: lint types  ## everything: linters, types, unit, property and end-to-end tests
	$(BIN)/python -m pytest -q

check: test

# A headless Chromium, with which the timeline's page is tested: where Debian's packages can be installed. Without one those tests are skipped.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && timeout 300 sh -c \
	  'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium' >/dev/null 2>&1; } || true

bench: setup  ## every benchmark, results into docs/results/
	$(BIN)/python bench/transfer.py --out docs/results/transfer.md
	$(BIN)/python bench/stream.py --out docs/results/stream.md
	$(BIN)/python bench/engine.py --out docs/results/engine.md
	$(BIN)/python bench/stack.py --out docs/results/stack.md
	$(BIN)/python bench/switch.py --out docs/results/switch.md
	$(BIN)/python bench/multiplex.py --out docs/results/multiplex.md
	$(BIN)/python bench/validate.py --out docs/results/validation.md

gpu-check:  ## GPU tests and benchmarks in under 8 minutes, into docs/results/; without a GPU, what is owed. Installs nothing
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu_check.py --out docs/results

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
