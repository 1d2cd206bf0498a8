PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo setup test fuzz lint format lock figures clean

demo: setup
	$(BIN)/python -m recipes.gemma3_12b_opercode

# A stamp newer than the lock means that the environment is the lock's.
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	@touch $@

test: setup
	$(BIN)/python -m pytest

# 10,000 files of each format, made to be read wrongly; what came of them.
fuzz: setup
	FUZZ_FILES=10000 FUZZ_OUT=results/fuzz.json $(BIN)/python -m pytest tests/test_fuzz.py -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --group dev pyproject.toml -o requirements.lock

# README's tables and picture, from results/.
figures: setup
	$(BIN)/python -m bench figures

clean:
	rm -rf $(VENV) .cache runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
