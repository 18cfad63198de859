# make book | test | lint | train | runs | bench | notebooks: each sets up what it needs by itself, in .venv, and a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SITE := _build/html

.PHONY: book test lint runs train bench notebooks clean
.DELETE_ON_ERROR:

book: $(INSTALLED)  ## build the rendered book from the stored outputs, warnings are errors
	rm -rf _build
	$(BIN)/jupyter-book build -W -n --keep-going . --quiet
	$(BIN)/python -m pytest tests/test_site.py --site $(SITE) --quiet
	@echo "Open $(CURDIR)/$(SITE)/index.html"

test: $(INSTALLED)  ## run every notebook, comparing its outputs, and the tests of the package and of the book
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=300

lint: $(INSTALLED)  ## formatting and lint, in place where ruff can: make lint FIX=1
	$(BIN)/ruff format $(if $(FIX),,--check) .
	$(BIN)/ruff check $(if $(FIX),--fix,) .

train: $(INSTALLED)  ## train a small model on drawn shapes, about a minute; more with python -m xvit_minimal.train --help
	$(BIN)/python -m xvit_minimal.train

runs: $(INSTALLED)  ## make the recorded runs that are missing: LIST=1, DEVICE=cuda, WORKERS=2, MINUTES=9
	$(BIN)/python book/tools/campaign.py $(if $(LIST),--list) $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(DEVICE),--device $(DEVICE)) $(if $(WORKERS),--workers $(WORKERS))

bench: $(INSTALLED)  ## time the attention against PyTorch's, whole models, training and dense steps, and write book/runs/bench/
	$(BIN)/python book/tools/bench.py
	$(BIN)/python book/tools/bench_models.py
	$(BIN)/python book/tools/bench_training.py
	$(BIN)/python book/tools/bench_dense.py

notebooks: $(INSTALLED)  ## bring the chapters in line with the package and the records, and run them
	$(BIN)/python book/tools/results.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python book/tools/sync.py

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $$($(PYTHON) --version) was found: run make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "could not create $(VENV): on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

clean:  ## remove what the other targets made
	rm -rf $(VENV) _build xvit_minimal.egg-info
