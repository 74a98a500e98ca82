# make setup | test | fuzz | faults | lint | types | bench | docs | reproduce-ch2 | reproduce-ch3 | reproduce-ch4 | reproduce [SIZE=smoke|laptop|...] [ARGS=--all]
#      train-generators | vendor-stylegan2-ada
# TASK: of chapter 3: mnist, or cartpole (policies).
# PYTHON: interpreter to build .venv from. TORCH: another requirement for torch, such as a CPU build's version or wheel.
# CONSTRAINTS: file of exact versions, those last tested by default; CONSTRAINTS= takes the newest that the packages admit.
PYTHON ?= python3
TORCH ?=
CONSTRAINTS ?= constraints.txt
SIZE ?= laptop
TASK ?= mnist
ARGS ?=
CASES ?= 20000
SEED ?= 0
BIN := .venv/bin
STAMP := .venv/.triptych-setup
PROJECTS := pyproject.toml $(wildcard packages/*/pyproject.toml)

STYLEGAN2_ADA := third_party/stylegan2-ada-pytorch
STYLEGAN2_ADA_COMMIT := d72cc7d041b42ec8e806021a205ed9349f87c6a4

.PHONY: setup test fuzz faults lint types bench docs reproduce-ch2 reproduce-ch3 reproduce-ch4 reproduce train-generators vendor-stylegan2-ada

setup: $(STAMP)

$(STAMP): requirements.txt $(CONSTRAINTS) $(PROJECTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "triptych needs Python 3.11 or newer; remove .venv and pass PYTHON=python3.11"; exit 1; }
	$(if $(TORCH),$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)')
	@# where TORCH names another torch, its pin and those of packages built for it do not hold
	@{ $(if $(CONSTRAINTS),$(if $(TORCH),grep -v '^torch',cat) $(CONSTRAINTS),true); } > .venv/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c .venv/constraints.txt
	@touch $@

# A worker a core, with one thread each: twice as fast as one process with all threads. A file's tests share its fixtures.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-report=term

# Damaged files for every reader: CASES of them, the same ones for the same SEED; resumes when repeated. Docs: docs/trust.md.
fuzz: setup
	$(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)
	HYPOTHESIS_PROFILE=fuzz OMP_NUM_THREADS=1 $(BIN)/python -m pytest packages/common/tests/test_files.py

# Every command under signals, full disks, damaged files and more; ARGS="--trials 3 --commands align" narrows it. Goes on if repeated.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fault_matrix.py $(ARGS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

docs: setup
	$(BIN)/triptych claims

reproduce-ch2: setup
	$(BIN)/triptych reproduce ch2 --size $(SIZE) $(ARGS)

reproduce-ch3: setup
	$(BIN)/triptych reproduce ch3 --size $(SIZE) $(ARGS) --task $(TASK)

reproduce-ch4: setup
	$(BIN)/triptych reproduce ch4 --size $(SIZE) $(ARGS)

reproduce: reproduce-ch2 reproduce-ch3 reproduce-ch4

# The two small generators that ship with triptych-gangealing, trained again: hours on two cores. Resumes when repeated.
train-generators: setup
	$(BIN)/triptych-gangealing train-gan --preset digits32
	$(BIN)/triptych-gangealing train-gan --preset digits32-3
	$(BIN)/python -m triptych_thesis.chapter4.embed runs/gan-digits32 digits32
	$(BIN)/python -m triptych_thesis.chapter4.embed runs/gan-digits32-3 digits32-3

# NVIDIA's networks, for those who accept their licence (non-commercial): never a part of this repository.
vendor-stylegan2-ada:
	@test -d $(STYLEGAN2_ADA)/.git || git clone --quiet https://github.com/NVlabs/stylegan2-ada-pytorch $(STYLEGAN2_ADA)
	git -C $(STYLEGAN2_ADA) checkout --quiet $(STYLEGAN2_ADA_COMMIT)
	@echo "$(STYLEGAN2_ADA): read LICENSE.txt there; triptych_gangealing.stylegan2.vendored runs it in place of ours"
