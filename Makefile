# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch goes first and alone, capped to the tested range, so that a CPU build on offer is taken.
TORCH := torch>=2.12,<2.14
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint types unit peers parity bench clean

demo: $(VENV)/installed
	$(BIN)/mldcn demo --out demo

test: lint types unit

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

unit: $(VENV)/installed-dev
	$(BIN)/pytest -n 2

# What benchmarks and parity tests compare with, in an environment of its own (.venv-peers).
peers: $(VENV)/installed
	$(BIN)/python benchmarks/peers.py

# Our modules beside other libraries', with their weights.
parity: peers
	PYTHONPATH=src .venv-peers/bin/python -m pytest -q -c /dev/null --rootdir parity -p no:cacheprovider parity

# All benchmarks (some 20 minutes on a machine that does nothing else); the figures go to docs/results/speed.json.
bench: $(VENV)/installed peers
	$(BIN)/python benchmarks/all.py --json docs/results/speed.json

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "mldcn needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d; try: make PYTHON=python3.12 demo" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-peers demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
