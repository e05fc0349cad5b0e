# make quickstart   train, prune and compare on the built-in data, then say where the report is
# make test-quick   the tests that start no process and compile nothing (2 minutes on two cores)
# make test         lint and all tests, those of two files at a time (WORKERS=4 where there are more cores)
# make lint         ruff, mypy, import-linter
# make docs         the documentation as a site in site/, every link checked (10 seconds after install)
# make gpu          the tests that need a CUDA device, and benchmarks/bench_gpu.py (8 minutes), in $(PYTHON) as it is
# make test-minimum all tests but DeepSpeed's, on the lowest versions that pyproject.toml allows and the oldest Python

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NEEDS  := import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=python3.x")

# The oldest that is there; python3.10 may be a name that only says it is not installed.
MINIMUM_PYTHON ?= $(shell python3.10 -c '' 2>/dev/null && echo python3.10 || echo $(PYTHON))
MINIMUM_VENV   := .venv-minimum

.PHONY: quickstart test-quick test gpu test-minimum lint docs clean
.NOTPARALLEL:

quickstart: $(VENV)/.installed-study
	$(BIN)/emp compare --config recipes/quickstart.yaml

# One thread, because beside another program several wait for each other.
test-quick: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not processes and not compiler" --timeout 60

# A file stays in one process, with what its tests share and its ports. A program that waits for another as slow as
# itself takes longer, so the limit of a test is longer than when it runs alone.
WORKERS  ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout 600

test: $(VENV)/.installed-all lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

# Nothing is installed: a machine with a GPU may reach no registry. Plugins of pytest that pyproject.toml counts on may
# be absent, so its options are left out. The benchmark runs also where a test has failed, or waits for ever.
GPU_TESTS := tests/gpu -m gpu -o addopts= -p no:cacheprovider --import-mode=importlib -q -ra --tb=short --disable-warnings
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	@$(PYTHON) tools/gpu_ready.py
	@failed=0; \
	timeout -s INT -k 30 300 $(PYTHON) -m pytest $(GPU_TESTS) --durations=10 || failed=1; \
	$(PYTHON) benchmarks/bench_gpu.py $(GPU_OPTIONS) || failed=1; \
	exit $$failed

test-minimum: $(MINIMUM_VENV)/.installed-test
	@$(MINIMUM_VENV)/bin/python --version
	@cat $(MINIMUM_VENV)/lowest.txt
	OMP_NUM_THREADS=1 $(MINIMUM_VENV)/bin/python -m pytest $(PARALLEL)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The variable silences what the theme says of a future mkdocs.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

# tools/make_venv.py VENV EXTRAS STAMPS: a stamp for each smaller set that is installed too.
$(VENV)/.installed-study: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) study .installed-study

$(VENV)/.installed-docs: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) docs .installed-docs

$(VENV)/.installed-dev: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) study,text,dev .installed-dev .installed-study .installed-docs

$(VENV)/.installed-all: pyproject.toml
	@$(PYTHON) -c '$(NEEDS)'
	@$(PYTHON) tools/make_venv.py $(VENV) all,dev .installed-all .installed-dev .installed-study .installed-docs

$(MINIMUM_VENV)/.installed-test: pyproject.toml
	@$(MINIMUM_PYTHON) -c '$(NEEDS)'
	@$(MINIMUM_PYTHON) tools/make_venv.py $(MINIMUM_VENV) study,text,test .installed-test --lowest

clean:
	rm -rf runs build site *.egg-info
	@$(PYTHON) tools/make_venv.py $(VENV) --remove
	@$(PYTHON) tools/make_venv.py $(MINIMUM_VENV) --remove
