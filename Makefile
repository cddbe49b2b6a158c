# make report                      run the notebooks for the miniature and render the report
# make report MODEL=llava-1.5-7b   the same for another file of params/
# make report FRESH=1              run again what ran already
# make report SHARDS=4 CORES=4     share each notebook's samples among four runs at once
# make report PROFILE=workflow/profiles/slurm SHARDS=8   the same on a Slurm cluster: see docs/cluster.md
# make check MODEL=llava-1.5-7b    look before: weights, data, memory, prompt, boxes, answers; and the time that it takes
# make test                        lint, types, unit tests, and every committed notebook held against its outputs
# make regression                  the last of these alone; with ATEN_CPU_CAPABILITY=avx2 under other arithmetic
# make quick                       lint and the unit tests that take no training, browser, Slurm or notebook (two minutes)
# make notebooks                   refresh the outputs in notebooks/ (before a commit)
# make data                        download GQA, Visual Genome's captions, OKVQA, A-OKVQA (29 GB); DATA=gqa for one of them
# make bench                       the sweep's speed beside the other ways, in ratios (some minutes)
# make docs                        write docs/parameters.md and docs/map.md anew from the code
# make lock                        write requirements.lock anew from the ranges in pyproject.toml
#
# Each command sets up .venv first. Inside a conda environment of environment.yml:
# make report READY= BIN=$CONDA_PREFIX/bin

MODEL ?= mini
CORES ?= 2
WORKERS ?= 2
SHARDS ?= 1
PYTHON ?= python3
BIN ?= .venv/bin
READY ?= .venv/.ready
# One thread for each notebook: for the miniature, two are slower than one.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)

$(if $(wildcard params/$(MODEL).yaml),,$(error There is no params/$(MODEL).yaml; the models are \
    $(sort $(basename $(notdir $(wildcard params/*.yaml))))))
LINT = $(BIN)/ruff check && $(BIN)/ruff format --check
NBVAL := $(BIN)/python -m pytest -q -rs --nbval --nbval-sanitize-with tests/sanitize.cfg
# Notebooks that a command starts needn't import the libraries anew. With WARM= each does.
WARM ?= $(BIN)/python workflow/warm.py serve

.PHONY: report check test regression stages quick notebooks data bench docs lock
.NOTPARALLEL:

# What is measured once is loaded the next time: with FRESH in the environment it is measured anew.
export FRESH

# Where a notebook fails, the others still run, and the report shows what succeeded.
report: $(READY)
	@$(if $(PROFILE),,$(WARM)) $(BIN)/python -m snakemake $(if $(PROFILE),--profile $(PROFILE),--cores $(CORES)) \
	    --config model=$(MODEL) shards=$(SHARDS) $(if $(filter-out 0,$(FRESH)),--forceall); \
	status=$$?; $(BIN)/python -m docs.build && exit $$status

# Says what is missing or wrong, each with a remedy; FETCH=1 fetches weights that aren't here.
check: $(READY)
	@$(BIN)/python -m workflow.check $(MODEL) $(if $(filter-out 0,$(FETCH)),--fetch)

quick: $(READY)
	$(LINT)
	$(BIN)/python -m pytest -q -n 2 -p no:nbval -m "not (slow or browser or slurm or notebook)"

# One worker more than two cores have: one waits for Slurm most of the time. Files of tests share what they build.
test: $(READY)
	$(LINT)
	$(BIN)/mypy
	$(WARM) $(BIN)/python -m pytest -q -rs -n 3 --dist loadfile --no-loadscope-reorder
	@$(MAKE) --no-print-directory regression

# NOTEBOOKS names some of them: each curates its samples itself where 01 hasn't. With two threads take one of WORKERS.
# Kernels as the report has them; the other two are as conftest.py sets them, since a fork begins as its kernel would.
test regression: export JUPYTER_PATH := $(CURDIR)/workflow/jupyter
test regression: export HF_HUB_OFFLINE := 1
test regression: export TOKENIZERS_PARALLELISM := false
regression: $(READY)
	@$(WARM) $(MAKE) --no-print-directory stages

stages:
	@folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && export MMFLOW_OUTPUTS=$$folder/outputs && \
	stages=$$([ -n "$(NOTEBOOKS)" ] && echo "$(NOTEBOOKS)" || $(BIN)/python -m workflow.graph --all --stages) && \
	echo "$$stages" | while read -r notebooks; do \
	    (set -x; $(NBVAL) -n $(WORKERS) --dist loadfile $$notebooks </dev/null) || exit 1; done

# In a folder of their own, so that all is measured anew but what comes with the project (FRESH=1 measures that, too: hours).
notebooks: $(READY)
	@export MMFLOW_OUTPUTS=$(CURDIR)/outputs/.notebooks && rm -rf $$MMFLOW_OUTPUTS && \
	notebooks=$$($(BIN)/python -m workflow.graph --all) && for notebook in $$notebooks; do \
	    $(BIN)/python -m workflow.run_notebook --in-place $$notebook || exit 1; done

data: $(READY)
	@$(BIN)/python -m workflow.download $(DATA)

bench: $(READY)
	@$(BIN)/python benchmarks/sweep_speed.py
	@$(BIN)/python benchmarks/shared_picture.py
	@$(BIN)/python benchmarks/head_speed.py

# torch is pinned without a build: pip takes the CPU build where it is told of one (PIP_FIND_LINKS or an
# extra index), and the registry's CUDA build elsewhere.
.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mmflow needs Python 3.11 or newer: name one with PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "Python's venv module is missing: install it with sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv from requirements.lock: this takes some minutes, once."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.lock
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

docs: $(READY)
	@$(BIN)/python -m docs.reference

lock:
	@folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && $(PYTHON) -m venv $$folder && \
	$$folder/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev]' && \
	{ echo '# What make installs: all that the core and [dev] of pyproject.toml bring along; written by make lock.'; \
	  $$folder/bin/python -m pip freeze --exclude-editable \
	  | sed -E 's/^(torch==[0-9.]+)\+.*/\1/; /^(nvidia-|triton|cuda-)/d'; } > requirements.lock
