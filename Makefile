# Targets for a machine that has Python and make. GPU machines: see gpu-check, and the Dockerfile.
PYTHON ?= python3
# .venv, unless PYTHON is given and is of another version than what is there: then .venv-3.12, or as it is called.
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
THERE := $(if $(wildcard .venv/bin/python),$(call version,.venv/bin/python))
ASKED := $(if $(and $(THERE),$(filter file,$(origin PYTHON))),$(THERE),$(call version,$(PYTHON)))
VENV := $(if $(and $(THERE),$(filter-out $(THERE),$(or $(ASKED),none))),.venv-$(or $(ASKED),none),.venv)
BIN := $(VENV)/bin
# Megatron-Core 0.19 needs Python 3.12; on 3.11 it is 0.16.
CONSTRAINTS := $(if $(filter 3.11,$(ASKED)),constraints.txt,constraints-3.12.txt)
# A stamp's name holds the digest of what it installed, so that a second run installs nothing.
KEY := $(shell cat setup.py $(CONSTRAINTS) | sha256sum | cut -c1-16)
BASE := $(VENV)/.base-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)

export OMP_NUM_THREADS ?= 1
# Where the environment forbids it (images of containers do), each pytest, its ranks and its commands would compile all
# files anew, and pytest rewrite all asserts: ten seconds of a processor for each target, two for each start of ranks.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup dev quickstart test test-312 test-te test-long test-families families-table families-record test-learning test-reliability test-slurm test-browser test-full lint typecheck gpu-check bench clean
.DELETE_ON_ERROR:

help: ## show the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(BASE) ## make .venv and install megavlm with its base packages

dev: $(DEV) ## the same, with what tests, lint and types need

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "megavlm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing)." \
	       "Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BASE): | $(BIN)/python
	$(PIP) -e .
	@rm -f $(VENV)/.base-* && touch $@

$(DEV): | $(BASE)
	$(PIP) -e '.[dev]'
	@rm -f $(VENV)/.dev-* && touch $@

quickstart: $(BASE) ## train a tiny model on generated images, on this machine
	$(BIN)/megavlm quickstart

# Half of the time of a test is waiting (for ranks to meet), so two processes run them, each a file at a time. WORKERS=0, or
# what pytest-xdist cannot do in PYTEST_ARGS (no plugin, a debugger, output as it comes): one, as ever.
WORKERS ?= 2
ALONE := $(filter no:xdist -pno:xdist --pdb --trace -s --capture=no,$(PYTEST_ARGS))
SPREAD = $(if $(or $(ALONE),$(filter 0,$(WORKERS))),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder)
test: $(DEV) ## run the tests (PYTEST_ARGS= for more options)
	$(BIN)/python -m pytest tests -q $(SPREAD) -m 'not long and not full and not reliability and not slurm and not browser and not learning' $(PYTEST_ARGS)

# What Megatron-Core's version can change: layers, layouts, optimizer, checkpoints, and those of one with the other.
SHORT := tests/parallel tests/models/test_vlm.py tests/training/test_layouts.py tests/training/test_optimizer.py \
  tests/training/test_other_megatron.py tests/families/test_round_trips.py tests/checkpoint/test_safe.py \
  tests/checkpoint/test_publish.py
test-312: ## a short set of tests on Python 3.12 with Megatron-Core 0.19 (installs 3 GB: its torch is a CUDA build)
	OTHER_PYTHON="$${OTHER_PYTHON-$$(test -x .venv/bin/python && realpath -s .venv/bin/python)}" \
	  $(MAKE) --no-print-directory PYTHON=$(if $(filter file,$(origin PYTHON)),python3.12,$(PYTHON)) short

.PHONY: short
short: $(DEV)
	$(BIN)/python -m pytest $(SHORT) -q -m 'not long and not full and not reliability' $(PYTEST_ARGS)

# TE_PIECES=folder:folder is put before the packages of PYTHON, so that Transformer Engine need not be installed.
test-te: ## build every layer of Transformer Engine, without a GPU, with this machine's own Python (TE_PIECES=folders)
	PYTHONPATH=$(CURDIR)$(if $(TE_PIECES),:$(TE_PIECES)) $(PYTHON) -m pytest tests/parallel/test_transformer_engine.py -q \
	  $(PYTEST_ARGS)

test-long: $(DEV) ## what takes half a minute and more: adapters and losses at layouts, recipes, timing, benchmarks
	$(BIN)/python -m pytest tests -q -m 'long and not family' $(PYTEST_ARGS)

# The base commit: SINCE=COMMIT, or auto (where the branch left origin/main, else the commit before), or all.
SINCE ?= auto
test-families: $(DEV) ## the longer tests of those families whose files, or whose parts' files, changed, and walks over all parts (SINCE=COMMIT|all)
	$(BIN)/python -m pytest tests -q -m 'long and family' --changed-since='$(SINCE)' $(PYTEST_ARGS)

families-table: $(DEV) ## megavlm/families/proven.json and docs/families.md anew, after a family was added
	$(BIN)/python tests/families/family_record.py

families-record: $(DEV) ## run what proves families (SINCE= as above), and record what passed
	$(BIN)/python -m pytest tests -q -m 'proves' --changed-since='$(SINCE)' --record-proofs $(PYTEST_ARGS)
	$(BIN)/python tests/families/family_record.py

test-learning: $(DEV) ## a model of each kind learns colours from pictures (half an hour)
	$(BIN)/python -m pytest tests -q -m learning $(PYTEST_ARGS)

test-reliability: $(DEV) ## runs that are killed, stopped, poisoned, out of disk (docs/reliability.md)
	$(BIN)/python -m pytest tests -q -m reliability $(PYTEST_ARGS)

test-slurm: $(DEV) ## the job scripts on a Slurm of two nodes, which it installs if it can (docs/cluster.md)
	@tools/install_slurm.sh
	$(BIN)/python -m pytest tests -q -m slurm $(PYTEST_ARGS)

test-browser: $(DEV) ## the web page in Debian's Chromium, which it installs if it can (docs/serving.md)
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || true
	$(BIN)/python -m pytest tests -q -m browser $(PYTEST_ARGS)

test-full: $(DEV) ## the quickstart at its full size, and what it must reach
	$(BIN)/python -m pytest tests -q -m full $(PYTEST_ARGS)

lint: $(DEV) ## ruff: rules and formatting; shell scripts; the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x examples/*.sh examples/slurm/*.sh examples/ssh/*.sh tools/*.sh tools/image/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

typecheck: $(DEV) ## mypy
	$(BIN)/mypy

# A GPU machine brings its own torch, which nothing here replaces.
gpu-check: ## short checks on a GPU, with this machine's own Python and torch (GPUS=8, ONLY="slice save")
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py $(if $(GPUS),--gpus $(GPUS)) $(if $(ONLY),--only $(ONLY))

bench: $(BASE) ## the benchmarks of this machine
	$(BIN)/python benchmarks/run.py

clean: ## remove .venv and caches
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
