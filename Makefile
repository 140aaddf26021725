# `make demo` and `make test` need nothing prepared: they install first, once (scripts/install.sh).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

PY := .venv/bin/python
DATA ?=
STEPS ?=
OUT ?= out/demo

help: ## Show the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: ## Make .venv and install what is needed (skipped when nothing changed)
	@scripts/install.sh

demo: install ## Train a small Llama over 4 local ranks (DATA=path, STEPS=n, OUT=dir)
	@$(PY) examples/demo.py $(if $(DATA),--data "$(DATA)") $(if $(STEPS),--steps $(STEPS)) --out "$(OUT)"

test: install ## Format, lint, types and all tests
	@scripts/check.sh all

check: install ## Format, lint, types and the fast tests
	@scripts/check.sh fast

format: install ## Reformat and fix what ruff can fix
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

clean: ## Remove caches and outputs, keep .venv
	@rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
