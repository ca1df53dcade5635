# The two commands a newcomer needs: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
RUN ?= runs/demo
BENCHMARKS ?= involution batch_norm step student loader decode cache checkpoint startup scan shards
# A machine with a CUDA device gets the ordinary builds; any other the CPU builds (1.1 GB instead of 5.5 GB).
CONSTRAINTS := $(if $(shell nvidia-smi -L 2>/dev/null),,-c constraints/cpu.txt)

.PHONY: setup demo test test-extras coverage check docs format bench chaos clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/coadvise fit digits --baseline --out $(RUN)

test: setup
	$(BIN)/pytest -n 2

test-extras:  # what needs heavy packages or many processes, in an environment of its own
	$(MAKE) setup VENV=.venv-extras EXTRAS=dev,datasets,shards,s3-server,tensorboard,wandb,mlflow,ray,slurm,demo,browser
	.venv-extras/bin/pytest -n 2 tests/extras
	.venv-extras/bin/pytest -n 2 -m slow

coverage: setup  # by branch
	$(BIN)/pytest -n 2 --cov --cov-report term

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup  # the site, into build/docs; a warning is an error, and so is anything loaded from elsewhere
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going docs build/docs
	! grep -rE --include='*.html' '<(script|img|iframe)[^>]+src="(https?:)?//|<link[^>]+href="(https?:)?//' build/docs

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name || exit 1; done

chaos: setup  # SIGKILL at random places, exits with 1 if anything was lost
	$(BIN)/python tests/chaos.py

clean:
	rm -rf $(VENV) .venv-extras runs build docs/reference
