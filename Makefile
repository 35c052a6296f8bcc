# Everything happens in .venv, which `make install` makes: nothing is installed elsewhere.
.DEFAULT_GOAL := help
.PHONY: help install demo test torture gpu clean
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
	@echo 'make demo     pack, pretrain, kill, go on, fine-tune and evaluate on real images, in four to seven minutes'
	@echo 'make test     lint, types and the whole test suite on the CPU'
	@echo 'make torture  the same tests with bigger numbers, and those marked torture'
	@echo 'make gpu      the tests that need a CUDA device'
	@echo 'make clean    remove .venv and caches; runs stay'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt pipeline/install.py
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 to 3.13 with venv found; install one or say PYTHON=...'; exit 2; }
	@$(PYTHON) -m pipeline.install
	@touch $@

# The demo and the tests are for two CPU cores, also where there is a GPU; the GPU's own are `make gpu`.
demo: $(INSTALLED)
	@CUDA_VISIBLE_DEVICES= .venv/bin/python demo/demo.py

test: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal

torture: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=long .venv/bin/pytest -m 'torture or not gpu'

gpu: $(INSTALLED)
	@.venv/bin/python -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else "make gpu: torch sees no CUDA device; .venv/bin/coatnet doctor says why")'
	.venv/bin/pytest -m gpu

clean:
	rm -rf .venv build coatnet.egg-info .pytest_cache .ruff_cache .hypothesis
