# Needs Python 3.11+, a C++ compiler and make; whatever else is missing is named with the command that brings it.
PYTHON ?= python3
GPU ?=
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
SETUP = $(PYTHON) .ci/environment.py

.DEFAULT_GOAL := help
.PHONY: help setup setup-images setup-test demo demo-images demo-pipeline demo-ab test soak bench lint clean python

help:  ## This list
	@echo "Archipelag: home GPUs as one inference service. Begin with: make demo"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20
	@echo
	@echo "  PYTHON=python3.12 chooses a Python, ARGS=… goes on to the program (make test ARGS='-k store')."

python:
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing. Debian: apt-get install python3 python3-venv" >&2; exit 1; }

setup: python  ## Make .venv with everything that an Island needs; GPU=cuda, vulkan or metal builds llama.cpp for it
	@$(SETUP) core --gpu "$(GPU)"

setup-images: python  ## The same, and what pictures need (torch, diffusers)
	@$(SETUP) images --gpu "$(GPU)"

setup-test: python  ## The same, and what the tests and linters need
	@$(SETUP) test --gpu "$(GPU)"

demo: setup  ## A Coordinator and two Islands on this machine, and an answer from a real model
	@$(BIN)/archipelag-node demo $(ARGS)

demo-images: setup-images  ## The same with a picture: installs torch and diffusers
	@$(BIN)/archipelag-node demo $(ARGS)

demo-pipeline: setup  ## One model over several Islands, one of which is killed in the middle of an answer
	@$(BIN)/archipelag-node demo --pipeline $(ARGS)

demo-ab: setup  ## An A/B test of two releases of a Cargo, from the candidate to the promotion and back
	@$(BIN)/archipelag-node demo --ab $(ARGS)

test: setup-test  ## All tests, with reduced counts
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 2 $(ARGS)

soak: setup-test  ## The tests that take long, with the full counts
	@$(BIN)/python -m pytest -m soak -s --timeout 0 $(ARGS)

bench: setup-test  ## Measure, and compare with other servers; the table goes to stdout, JSON to bench/results/
	@$(SETUP) bench
	@$(BIN)/python bench/run.py $(ARGS)

lint: setup-test  ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:  ## Delete environments and caches of tools; models stay in the user's cache
	rm -rf .venv .venv-bench build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
