# Everything happens in .venv, which `make install` makes: nothing is installed elsewhere.
.DEFAULT_GOAL := help
.PHONY: help install demo lint check test docs torture gpu clean
.DELETE_ON_ERROR:

INSTALLED := .venv/installed
export GPU_CUDA

# The first Python that really runs, is one that pyproject.toml allows, and can make environments.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

help:
	@echo 'make install  the virtual environment .venv, with the builds of torch and DALI that fit this machine'
	@echo '              (GPU_CUDA=13 or 12 on a login node, for nodes with GPUs; PYTHON=... for another Python)'
	@echo 'make demo     pack, pretrain, kill, resume, fine-tune and evaluate on real images, in two to seven minutes'
	@echo 'make check    lint, types and the tests that are quick: for while you work'
	@echo 'make test     lint, types and the whole test suite on the CPU'
	@echo 'make docs     the site, as docs/_build/docs/index.html; a warning or a link that leads nowhere is an error'
	@echo 'make torture  the same tests with bigger numbers, and those marked torture'
	@echo 'make gpu      what a CUDA device shows (coatnet bench gpu, ten minutes), and the tests that need one'
	@echo 'make clean    remove .venv and caches; runs stay'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt pipeline/doctor/install.py
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 to 3.13 with venv found; install one or say PYTHON=...'; exit 2; }
	@$(PYTHON) -m pipeline.doctor.install
	@touch $@

# The demo and the tests are for two CPU cores, also where there is a GPU; the GPU's own are `make gpu`.
demo: $(INSTALLED)
	@CUDA_VISIBLE_DEVICES= .venv/bin/python demo/demo.py

lint: $(INSTALLED)
	@! grep -rnE '^(<<<<<<<|>>>>>>>) ' --include='*.md' README.md docs  # what a merge left
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python

PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/pytest

# What trains, or submits to a Slurm; and long properties, DALI, whole families, and doctors.
NOT_IN_CHECK := test_ablations test_forked test_benchmarks test_documents $(addprefix slurm/test_,jobs damaged_files without_submit) \
	$(addprefix pipeline/test_,attempts cold_starts end_to_end export faults guards memory mirror mixing out_of_memory \
	monitoring plan_costs predict replay report restore saving stops waits watchdog zero) models/test_norm_across_ranks \
	$(addprefix data/test_,cache codec decode loader schedules storage) pipeline/test_preview \
	$(addprefix models/test_,compiled convert count) $(addprefix pipeline/test_,doctor rank_doctor)

check: lint
	$(PYTEST) -n 2 $(NOT_IN_CHECK:%=--ignore tests/%.py)
	@echo 'make check left out, of make test: $(NOT_IN_CHECK)'

# Four workers for two cores, since much is waiting; a file stays with one, for what it trains once; the longest first.
test: lint
	$(PYTEST) -n 4 --dist loadfile --no-loadscope-reorder

docs: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= .venv/bin/python -m sphinx -nWEaq -c docs . docs/_build
	.venv/bin/python docs/links.py docs/_build

torture: $(INSTALLED)
	HYPOTHESIS_PROFILE=long $(PYTEST) -m 'torture or not gpu'

gpu: $(INSTALLED)
	@.venv/bin/python -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else "make gpu: torch sees no CUDA device; .venv/bin/coatnet doctor says why")'
	@status=0; .venv/bin/coatnet bench gpu || status=1; .venv/bin/pytest -m gpu && exit $$status

clean:
	rm -rf .venv build docs/_build coatnet.egg-info .pytest_cache .ruff_cache .hypothesis
