# Thin: every target is one call of `python -m act_lightning VERB`, after .ci/setup has seen to .venv.
#   EXP    an experiment, experiments/$(EXP).yaml       RUN    a run's directory; by default EXP's newest
#   ARGS   overrides for the verb, e.g. ARGS="--trainer.max_steps=100"

PYTHON := .venv/bin/python
EPISODES ?= 200

CONFIGS = --config experiments/base.yaml --config experiments/$(EXP).yaml
EXPERIMENTS = $(shell find experiments -name '*.yaml' -not -path '*/studies/*' -not -path experiments/base.yaml \
	| sed 's|^experiments/||; s|\.yaml$$||' | sort)
# A run's newest checkpoint dates it: its directory changes whenever it is evaluated.
RUN ?= $(if $(EXP),$(shell ls -t runs/$(EXP)/*/checkpoints/*.ckpt 2>/dev/null | head -n 1 | sed 's|/checkpoints/.*||'))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup data train resume eval test test-slow lint type tensorboard clean known-experiment known-run

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Experiments (EXP=): $(EXPERIMENTS)"

setup: ## Make .venv, install everything into it, find or install OpenGL; quick when done
	@.ci/setup

data: known-experiment setup ## Record EXP's demonstrations; returns at once when they are there
	$(PYTHON) -m act_lightning record $(CONFIGS) $(ARGS)

train: data ## Record EXP's demonstrations, train on them, roll out: make train EXP=insertion
	$(PYTHON) -m act_lightning fit $(CONFIGS) $(ARGS)

resume: known-run setup ## Continue RUN from its last checkpoint
	$(PYTHON) -m act_lightning fit --config $(RUN)/config.yaml --run $(notdir $(patsubst %/,%,$(RUN))) --ckpt_path $(RUN)/checkpoints/last.ckpt $(ARGS)

eval: known-run setup ## Evaluate RUN (or EXP's newest run) in EPISODES worlds (200)
	$(PYTHON) -m act_lightning evaluate $(RUN) --episodes $(EPISODES) $(ARGS)

test: setup ## Run the fast tests
	$(PYTHON) -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: setup ## Run the tests that take minutes
	$(PYTHON) -m pytest -m "slow and not gpu" $(ARGS)

lint: setup ## Check style and formatting (ruff)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

type: setup ## Check types (mypy --strict)
	$(PYTHON) -m mypy $(ARGS)

tensorboard: setup ## Show all runs in TensorBoard
	$(PYTHON) -m tensorboard.main --logdir runs $(ARGS)

clean: ## Remove caches; .venv, demonstrations and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find act_lightning tests -name __pycache__ -prune -exec rm -rf {} +

known-experiment:
	@[ "$(EXP)" ] && [ "$(filter $(EXP),$(EXPERIMENTS))" = "$(EXP)" ] || { \
	  echo "EXP=$(EXP): no such experiment; these exist: $(EXPERIMENTS)" >&2; exit 1; }

known-run:
	@[ -f "$(RUN)/config.yaml" ] || { \
	  echo "RUN=$(RUN): no run there; these exist:" $$(ls -d runs/*/*/config.yaml runs/*/*/*/config.yaml 2>/dev/null \
	  | sed 's|/config.yaml||') >&2; exit 1; }
