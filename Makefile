# make demo        cells of a pretrained pipeline of phantoms: outputs/demo_cells/{cells.png, surfaces.png, report.md, volumes/}
# make train-demo  train such a pipeline in minutes, smaller: outputs/train-demo/
# make test        the tests; make test ARGS="-m slow" for the long ones
# make app         a page that generates cells and shows them, on this machine alone; make app ARGS="--port 8000"
# make docs        the site: outputs/site/index.html
# make lint        ruff
# make venv        .venv/ with the pinned versions of what the demos need; make test adds what the tests need
# make clean       remove .venv/, outputs/ of the demos and caches
#
# PYTHON=python3.12      another interpreter (3.10 or newer)
# TORCH_INDEX=https://download.pytorch.org/whl/cpu   the CPU wheel, where PyPI's brings CUDA

PYTHON ?= python3
ARGS ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-tests
APP_STAMP := $(VENV)/.installed-app
DOCS_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: venv demo train-demo test app docs lint clean

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "diffusers_byoc needs Python 3.10 or newer, got $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) --editable ".[train]"
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) --editable ".[dev]"
	@touch $@

$(APP_STAMP): $(STAMP)
	$(PIP) --editable ".[app]"
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) --editable ".[docs]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py --output_dir outputs/demo_cells $(ARGS)

train-demo: $(STAMP)
	$(BIN)/accelerate launch --quiet examples/train_byoc.py --output_dir outputs/train-demo $(ARGS)

test: $(TEST_STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

app: $(APP_STAMP)
	$(BIN)/byoc-app $(ARGS)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) outputs/demo_cells outputs/train-demo outputs/site build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
