# Thin: every target is one call of `python -m act_lightning VERB`, after .ci/setup has seen to .venv.
#   EXP    an experiment, experiments/$(EXP).yaml, or a folder of them, one after the other
#   RUN    a run's directory; by default EXP's newest
#   RUNS   directories of several runs
#   STUDY  a study, experiments/studies/$(STUDY).yaml; JOBS of its runs at once
#   DEVICES  processes that train together, each on a GPU, or on a CPU; by default one
#   NODES  of a Slurm job (1), with GPUS on each (1; 0: none), for TIME minutes (240) in PARTITION; SEEDS, as 0-4, train one each
#   ARGS   overrides for the verb, e.g. ARGS="--trainer.max_steps=100"

PYTHON := .venv/bin/python
EPISODES ?= 200
GPUS ?= 1
# Tests side by side, a core each: with more threads than cores, OpenMP's wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n logical --maxprocesses 4 --dist worksteal

EXPERIMENTS = $(shell find experiments -name '*.yaml' -not -path '*/studies/*' -not -path experiments/base.yaml -not -name executions.yaml \
	| sed 's|^experiments/||; s|\.yaml$$||' | sort)
STUDIES = $(patsubst experiments/studies/%.yaml,%,$(sort $(wildcard experiments/studies/*.yaml)))
STUDY_RUNS = runs/studies/$(STUDY)
COLUMNS = build/tensorboard/$(STUDY)
BENCHES = $(addprefix bench-,train policy data rollout success start overheads growth)
FOLDERS = $(sort $(patsubst %/,%,$(filter-out ./,$(dir $(EXPERIMENTS)))))
MEMBERS = $(filter $(EXP) $(EXP)/%,$(EXPERIMENTS))
WORLD = $(if $(DEVICES),--trainer.devices=$(DEVICES))
JOB = $(strip $(if $(NODES),--nodes=$(NODES)) $(if $(SEEDS),--seeds=$(SEEDS)) $(if $(DRY),--dry-run) \
	--slurm $(patsubst %,gpus_per_node=%,$(filter-out 0,$(GPUS))) $(if $(TIME),timeout_min=$(TIME)) $(if $(PARTITION),partition=$(PARTITION)))
# each VERB[,SETTINGS]: a command line for each of EXP's members.
define each
$(foreach member,$(MEMBERS),$(PYTHON) -m act_lightning $(1) --config experiments/base.yaml --config experiments/$(member).yaml$(if $(2), $(2)) $(ARGS)
)
endef
# A run's newest checkpoint dates it: its directory changes whenever it is evaluated.
RUN ?= $(if $(EXP),$(shell ls -t runs/$(EXP)/*/checkpoints/*.ckpt 2>/dev/null | head -n 1 | sed 's|/checkpoints/.*||'))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup data inspect train slurm profile resume eval watch sweep compare test test-slow test-cluster lerobot-env test-lerobot $(BENCHES) bench lint type tensorboard clean known-experiment known-run known-study

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile
	@echo "Experiments (EXP=): $(EXPERIMENTS)"
	@echo "Studies (STUDY=): $(STUDIES)"

setup: ## Make .venv, install everything into it, find or install OpenGL; quick when done
	@.ci/setup

data: known-experiment setup ## Record EXP's demonstrations; returns at once when they are there
	$(call each,record)

inspect: known-experiment setup ## Show what EXP's demonstrations hold, and what is wrong with them
	$(call each,inspect)

train: data ## Record EXP's demonstrations, train on them, roll out: make train EXP=insertion
	$(call each,fit,$(WORLD))

slurm: known-experiment setup ## Train EXP as a Slurm job: make slurm EXP=insertion NODES=4 GPUS=8; DRY=1 shows it only
	$(call each,slurm,$(JOB))

profile: data ## Show what a training step of EXP spends its time on: a Chrome trace and a table
	$(call each,profile,$(WORLD))

resume: known-run setup ## Continue RUN from its last checkpoint
	$(PYTHON) -m act_lightning fit --config $(RUN)/config.yaml --run $(notdir $(patsubst %/,%,$(RUN))) --ckpt_path $(RUN)/checkpoints/last.ckpt$(if $(WORLD), $(WORLD)) $(ARGS)

eval: known-run setup ## Evaluate RUN (or EXP's newest run) in EPISODES worlds (200)
	$(PYTHON) -m act_lightning evaluate $(RUN) --episodes $(EPISODES) $(ARGS)

watch: known-run setup ## Watch RUN (or EXP's newest run) play; without a display, write a video
	$(PYTHON) -m act_lightning watch $(RUN) $(ARGS)

sweep: known-study setup ## Train all runs of STUDY, JOBS at once; finished ones are left alone
	$(PYTHON) -m act_lightning sweep experiments/studies/$(STUDY).yaml $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

compare: $(if $(STUDY),known-study) setup ## Compare STUDY's runs, in tables and a report; or RUNS="runs/a/version_0 runs/b/version_0"
	$(PYTHON) -m act_lightning compare $(if $(STUDY),--study experiments/studies/$(STUDY).yaml,$(RUNS)) $(ARGS)

test: setup ## Run the fast tests
	$(PYTEST) -m "not slow and not gpu and not cluster and not lerobot" $(ARGS)

test-slow: setup ## Run the tests that take minutes
	$(PYTEST) -m "slow and not gpu and not cluster and not lerobot" --durations=40 $(ARGS)

test-cluster: setup ## Run the tests that start a Slurm of their own, as root
	$(PYTHON) -m pytest -m cluster tests/cluster $(ARGS)

lerobot-env: ## Make .venv-lerobot, an environment of its own for LeRobot (Python 3.12 or newer)
	@.ci/lerobot-env

test-lerobot: lerobot-env ## Compare with LeRobot's own code, live
	.venv-lerobot/bin/python -m pytest -m lerobot tests/lerobot $(ARGS)

# Those that run LeRobot in their own process do so in its environment; the others start it there.
bench: $(BENCHES) ## Measure our speed against LeRobot's and stock gym-aloha's: an hour; figures in build/bench

bench-train: BENCH = .venv-lerobot/bin/python tests/bench/train.py
bench-train: ## A training step, and its memory

bench-policy: BENCH = .venv-lerobot/bin/python tests/bench/policy.py
bench-policy: ## Latency and throughput of a policy

bench-data: BENCH = .venv-lerobot/bin/python tests/bench/data.py
bench-data: ## Samples a second of the readers

bench-rollout: BENCH = $(PYTHON) tests/bench/rollouts.py
bench-rollout: ## Episodes a minute of rollouts

bench-success: BENCH = $(PYTHON) tests/bench/success.py
bench-success: ## Time to 90% success on insertion_state

bench-start: BENCH = $(PYTHON) tests/bench/start.py
bench-start: ## From the command to the first training step

bench-overheads: BENCH = $(PYTHON) tests/bench/overheads.py
bench-overheads: ## What training costs beside its arithmetic

bench-growth: BENCH = $(PYTHON) tests/bench/growth.py
bench-growth: ## How cost grows with cameras, chunk, batch and episodes

$(BENCHES): setup lerobot-env
	$(BENCH) --json build/bench/$(@:bench-%=%).json $(ARGS)

lint: setup ## Check style and formatting (ruff)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

type: setup ## Check types (mypy --strict)
	$(PYTHON) -m mypy $(ARGS)

# A study's columns of the tab HPARAMS are shown with the study alone: among all runs TensorBoard would take them for all.
tensorboard: $(if $(STUDY),known-study) setup ## Show all runs in TensorBoard, or only those of STUDY, named by what varies
ifdef STUDY
	@mkdir -p $(COLUMNS)
	@! [ -f $(STUDY_RUNS)/columns.hparams ] || cp $(STUDY_RUNS)/columns.hparams $(COLUMNS)/events.out.tfevents.0.columns
	$(PYTHON) -m tensorboard.main --logdir_spec $(STUDY_RUNS),$(COLUMNS) $(ARGS)
else
	$(PYTHON) -m tensorboard.main --logdir runs $(ARGS)
endif

clean: ## Remove caches; .venv, demonstrations and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find act_lightning tests -name __pycache__ -prune -exec rm -rf {} +

known-experiment:
	@[ "$(EXP)" ] && [ "$(filter $(EXP),$(EXPERIMENTS) $(FOLDERS))" = "$(EXP)" ] || { \
	  echo "EXP=$(EXP): no such experiment; these exist: $(EXPERIMENTS)" >&2; exit 1; }

known-run:
	@[ -f "$(RUN)/config.yaml" ] || { \
	  echo "RUN=$(RUN): no run there; these exist:" $$(ls -d runs/*/*/config.yaml runs/*/*/*/config.yaml 2>/dev/null \
	  | sed 's|/config.yaml||') >&2; exit 1; }

known-study:
	@[ "$(STUDY)" ] && [ "$(filter $(STUDY),$(STUDIES))" = "$(STUDY)" ] || { \
	  echo "STUDY=$(STUDY): no such study; these exist: $(STUDIES)" >&2; exit 1; }
