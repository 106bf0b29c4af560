# Everything that a user or CI runs. `make demo`, `make test` and the others set everything up by themselves.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Use an installed uv if pyproject.toml's required-version accepts it, otherwise one in its own venv: a system Python may
# refuse `pip install` outside of a venv.
UV := $(or $(shell uv tree --frozen --depth 0 >/dev/null 2>&1 && command -v uv),.tools/bin/uv)
# Use the system's certificates if there are any: behind a company's proxy uv's own list is not enough.
export UV_SYSTEM_CERTS := $(if $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt),true,false)
RUN := .venv/bin
READY := .venv/.ready

export POLICY SUITE TASKS N_EPISODES AXIS N OUTPUT ARGS LEROBOT

# Where LeRobot's next version is installed for `make test-next`; what uv.lock names stays in .venv.
NEXT := .venv-next

.PHONY: help setup demo eval-libero eval-libero-plus e2e-libero worth worth-smoke test test-next faults test-all coverage lint format bench docs clean system-libraries

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY) ## Make .venv with everything that uv.lock names

.tools/bin/uv:
	@python3 -m venv .tools || { echo "make: python3 has no venv module: install it (Debian: apt-get install python3-venv), or uv itself" >&2; exit 1; }
	@.tools/bin/pip install --quiet --disable-pip-version-check uv

# A short command spends its time on imports: without compiled bytecode `extract` compiles 4,400 modules, each time that
# it runs where Python may not write them (a read-only venv, PYTHONDONTWRITEBYTECODE, which many images set).
$(READY): pyproject.toml packages/lerobot_policy_pi05_geometry/pyproject.toml uv.lock | $(filter .tools/bin/uv,$(UV))
	@echo "installing what uv.lock names into .venv"
	@$(UV) sync --locked --quiet --all-extras --compile-bytecode
	@touch $@

system-libraries:
	@bash pipelines/system_libraries.sh

demo: $(READY) ## Extract the shipped episodes with DA3-SMALL; MODEL=DA3-SMALL downloads the real weights
	@MODEL="$(MODEL)" PATH="$(CURDIR)/$(RUN):$$PATH" bash pipelines/demo.sh

eval-libero: $(READY) system-libraries ## Evaluate the newest checkpoint in LIBERO [POLICY=...] [SUITE=libero_10] [TASKS=0,1] [N_EPISODES=10]
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash pipelines/eval_libero.sh

eval-libero-plus: $(READY) system-libraries ## Evaluate a checkpoint on LIBERO-Plus POLICY=... [AXIS=camera] [SUITE=libero_object] [N=100]
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash pipelines/eval_libero_plus.sh

e2e-libero: $(READY) system-libraries ## Record, extract, train and solve a task in LIBERO, on two CPU cores (40 minutes) [SEEDS=1000,1001,1002]
	@PATH="$(CURDIR)/$(RUN):$$PATH" bash pipelines/e2e_libero.sh

worth: $(READY) system-libraries ## Does geometry help? The experiment of docs/worth.md on two CPU cores (hours; SIZE=gpu: on a GPU)
	@PATH="$(CURDIR)/$(RUN):$$PATH" pipelines/worth/worth.sh

worth-smoke: $(READY) system-libraries ## Run every stage of the experiment in its smallest size (minutes)
	@SIZE=smoke PATH="$(CURDIR)/$(RUN):$$PATH" pipelines/worth/worth.sh

test: $(READY) system-libraries ## Run the tests (minutes)
	$(RUN)/python -m pytest -n auto --dist worksteal -m "not slow" --durations=30

test-next: system-libraries | $(filter .tools/bin/uv,$(UV)) ## Run the tests with another LeRobot: LEROBOT=CHECKOUT [ARGS=tests/policy]
	@[ -d "$$LEROBOT/src/lerobot" ] || { echo "make: LEROBOT: expected the folder of a checkout of LeRobot, got '$$LEROBOT': clone it and name it" >&2; exit 1; }
	@UV_PROJECT_ENVIRONMENT=$(NEXT) $(UV) sync --locked --quiet --all-extras
	@$(UV) pip install --quiet --python $(NEXT)/bin/python --no-deps "$$LEROBOT" "diffusers>=0.38,<0.40"
	$(NEXT)/bin/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

faults: $(READY) ## Run every fault test and print the figures of docs/RELIABILITY.md (up to an hour)
	$(RUN)/python -m pytest tests/faults -p no:xdist

test-all: $(READY) system-libraries ## Run the tests, the slow ones too
	$(RUN)/python -m pytest -n auto

lint: $(READY) ## Check style, types and shell scripts
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports pyproject.toml --no-cache
	$(RUN)/shellcheck .ci/run pipelines/*.sh pipelines/slurm/*.sh pipelines/worth/*.sh

coverage: $(READY) system-libraries ## Run the tests and list the lines of geomcache/ that they miss (slower than `test`)
	$(RUN)/python -m pytest -n auto --dist worksteal -m "not slow" --cov --cov-report=term-missing:skip-covered

format: $(READY) ## Format the code
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

bench: $(READY) ## Print the tables of benchmarks/RESULTS.md again
	@for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(RUN)/python "$$bench"; done

docs: $(READY) ## Build the documentation into outputs/site, and check its links
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet
	@echo "outputs/site/index.html"

clean: ## Remove what was built and downloaded
	rm -rf .venv $(NEXT) .tools outputs dist .pytest_cache .mypy_cache .ruff_cache
