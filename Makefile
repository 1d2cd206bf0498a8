PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# What breaks first with older versions: imports, the ladder, the losses, and a recipe under each backend.
OLDEST_TESTS := tests/test_imports.py tests/test_choose.py tests/test_components.py tests/test_portable_loss.py \
	tests/test_losses.py 'tests/test_e2e.py::test_every_backend_learns_the_same[gemma2_2b_ohlora-unsloth]' \
	'tests/test_e2e.py::test_a_recipe_trains_saves_reloads_and_answers[gemma2_2b_ohlora-unsloth]' \
	'tests/test_e2e.py::test_a_recipe_trains_saves_reloads_and_answers[gemma2_2b_ohlora-peft]'

.PHONY: demo setup setup-cu126 test test-oldest fuzz soak lint format lock figures clean

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

# In place of setup, for cards of compute capability 5.0 to 7.0: .venv anew, with the last torch that has kernels for
# them. Two steps, since only torch and what it brings along may come from its own index.
setup-cu126:
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(BIN)/uv pip install --python $(BIN)/python --index-url https://download.pytorch.org/whl/cu126 \
		$$(grep '^torch==' requirements-cu126.lock)
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r requirements-cu126.lock
	@touch $(VENV)/.installed

test: setup test-oldest
	$(BIN)/python -m pytest

# The oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)

$(OLDEST)/.installed: pyproject.toml | setup
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python $(OLDEST)/bin/python --group dev pyproject.toml \
		-o $(OLDEST)/requirements.txt
	$(BIN)/uv pip sync --quiet --python $(OLDEST)/bin/python $(OLDEST)/requirements.txt
	@touch $@

# 10,000 files of each format, made to be read wrongly; what came of them.
fuzz: setup
	FUZZ_FILES=10000 FUZZ_OUT=results/fuzz.json $(BIN)/python -m pytest tests/test_fuzz.py -q

# An hour or more: 200 trainings killed at random moments, resumed, evaluated and asked.
soak: setup
	@mkdir -p runs
	$(BIN)/python -m bench soak --jobs 2 --out runs/soak.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The second lock holds the same versions for cards below compute capability 7.0: without what needs Triton, and with
# a torch for CUDA 12.6, whose own CUDA packages come with it in setup-cu126.
lock: setup
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --group dev pyproject.toml -o requirements.lock
	@mkdir -p .cache/cu126
	grep -vE '^ +"(unsloth|xformers|liger-kernel)>=' pyproject.toml > .cache/cu126/pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header \
		--group .cache/cu126/pyproject.toml:dev .cache/cu126/pyproject.toml --constraints requirements.lock \
		$$(grep -oE '^(cuda|nvidia-(cu|nc|nv)|torch|triton)[a-z0-9-]*' requirements.lock | sed 's/^/--no-emit-package=/') \
		-o requirements-cu126.lock
	sed -nE 's/^(torch==[0-9.]+) .*/\1+cu126/p' requirements.lock >> requirements-cu126.lock

# README's tables and picture, from results/.
figures: setup
	$(BIN)/python -m bench figures

clean:
	rm -rf $(VENV) $(OLDEST) .cache runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
