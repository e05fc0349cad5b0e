# make quickstart   train, prune and compare on the built-in data, then say where the report is
# make test-quick   the tests that start no process and compile nothing (2 minutes on two cores)
# make test         lint and all tests (15 minutes on two cores)
# make lint         ruff, mypy, import-linter

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NEEDS  := import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=python3.x")

.PHONY: quickstart test-quick test lint clean
.NOTPARALLEL:

quickstart: $(VENV)/.installed-study
	$(BIN)/emp compare --config recipes/quickstart.yaml

# One thread, because beside another program several wait for each other. `make test` takes all, as users do.
test-quick: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not processes and not compiler" --timeout 60

test: $(VENV)/.installed-all lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# tools/make_venv.py VENV EXTRAS STAMPS: a stamp for each smaller set that is installed too.
$(VENV)/.installed-study: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) study .installed-study

$(VENV)/.installed-dev: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) study,hf,shrink,dev .installed-dev .installed-study

$(VENV)/.installed-all: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) all,dev .installed-all .installed-dev .installed-study

clean:
	rm -rf runs build *.egg-info
	@$(PYTHON) tools/make_venv.py $(VENV) --remove
