# Each target sets itself up: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench fuzz torchrun matrix supply faults clean

demo: $(VENV)/demo.ready
	$(BIN)/bntools demo

test: $(VENV)/test.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.ready
	$(BIN)/python tests/benchmarks

# Jobs of several processes: the same statistics whatever N, one message whoever dies, and the time.
torchrun: $(VENV)/test.ready
	$(BIN)/python tests/trust/torchrun.py

fuzz: $(VENV)/test.ready
	$(BIN)/python tests/trust/fuzz.py $(READER) $(if $(N),-n $(N))

# The suite on the oldest and the newest versions promised; ROW=newest-3.13 runs that row.
matrix: $(VENV)/test.ready
	$(BIN)/python tests/trust/matrix.py $(ROW)

# What an installation brings: packages, megabytes, licences.
supply: $(VENV)/test.ready
	$(BIN)/python tests/trust/supply.py

faults: $(VENV)/test.ready
	$(BIN)/python tests/trust/faults.py

$(VENV)/%.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
