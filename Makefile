# make setup | test | lint | bench | docs | reproduce-ch2 | reproduce-ch3 [SIZE=smoke|laptop|...] [ARGS=--all]
# PYTHON: interpreter to build .venv from. TORCH: another requirement for torch, such as a CPU build's version or wheel.
PYTHON ?= python3
TORCH ?=
SIZE ?= laptop
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.triptych-setup
PROJECTS := pyproject.toml $(wildcard packages/*/pyproject.toml)

.PHONY: setup test lint bench docs reproduce-ch2 reproduce-ch3 reproduce

setup: $(STAMP)

$(STAMP): requirements.txt $(PROJECTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "triptych needs Python 3.11 or newer; remove .venv and pass PYTHON=python3.11"; exit 1; }
	$(if $(TORCH),$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)')
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m benchmarks

docs: setup
	$(BIN)/python -m triptych_common.claims claims.toml docs/claims.md

reproduce-ch2: setup
	$(BIN)/triptych-dit reproduce --size $(SIZE) $(ARGS)

reproduce-ch3: setup
	$(BIN)/triptych-gpt reproduce --size $(SIZE) $(ARGS)

reproduce: reproduce-ch2 reproduce-ch3
