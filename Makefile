# `make help` lists the targets. A newcomer needs two: `make demo` and `make test`.
PYTHON ?= python3
SETTINGS ?=
OUT ?= runs/demo
LOCK ?= --python-version 3.11
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: help demo test docs nightly mutation soak recipes check lock bench-ledger bench-deidentify bench-dp bench-secagg bench-differences bench-rounds bench-sim install clean FORCE

demo: $(INSTALLED)  ## four hospitals fine-tune one model; writes runs/demo/report.html
	$(BIN)/silotune sim run heart-diagnosis $(SETTINGS) --out $(OUT)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: check  ## everything that must hold
	$(BIN)/pytest -n auto

docs: $(INSTALLED)  ## the documentation as a site in build/docs; a warning is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --config-settings editable_mode=strict -e '.[dev,docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

nightly: $(INSTALLED) mutation  ## what takes minutes: two million rows, notebooks, mutants
	$(BIN)/pytest -m nightly

mutation: $(INSTALLED)  ## faults put into the files that protect records; the tests must see each
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --config-settings editable_mode=strict -e '.[dev,mutation]'
	$(BIN)/python -m tests.mutation

soak: $(INSTALLED)  ## every fault to real federations, as root; writes simulations/benchmarks/results/soak.json
	$(BIN)/python -m tests.system.soak

recipes: $(INSTALLED)  ## every recipe pooled, alone, federated, with DP; writes simulations/studies/recipes.{json,md}
	$(BIN)/python -m silotune.simulations.comparison.recipe_table

bench-rounds: $(INSTALLED)  ## what a round costs beyond training; writes results/rounds.json
	$(BIN)/python -m silotune.simulations.benchmarks.rounds

# pfl wants an older dp-accounting than dev has: of both the bench needs nothing, so without what
# it depends on; the extra has the rest.
bench-sim: $(INSTALLED)  ## a simulated client beside Flower's and pfl-research's; writes results/sim.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --config-settings editable_mode=strict -e '.[dev,bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-deps pfl
	$(BIN)/python -m silotune.simulations.benchmarks.sim

# For the images: docker build installs from these files by hash where they are. For another machine
# than this one: make lock LOCK='--python-version 3.11 --python-platform aarch64-manylinux_2_28'.
lock: $(INSTALLED)  ## the SHA-256 of all that is installed, from pip's index; writes *requirements.lock
	$(BIN)/python -m silotune.common.runtime.requirements_lock $(LOCK)

check: $(INSTALLED)  ## format, ruff, mypy strict and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layout.py

bench-ledger: $(INSTALLED)  ## what a charge costs; writes simulations/benchmarks/results/ledger.json
	$(BIN)/python -m silotune.simulations.benchmarks.ledger

bench-secagg: $(INSTALLED)  ## what masking costs beside Flower's SecAgg+; writes results/secagg.json
	$(BIN)/python -m silotune.simulations.benchmarks.secagg

bench-differences: $(INSTALLED)  ## what the difference of two masked sums shows of a site; writes results/differences.json
	$(BIN)/python -m silotune.simulations.benchmarks.differences

bench-deidentify: $(INSTALLED)  ## how much of what is personal is found; writes results/deidentify.json
	$(BIN)/python -m silotune.simulations.benchmarks.deidentify

bench-dp: $(INSTALLED)  ## what a private step costs; writes simulations/benchmarks/results/dp.json
	$(BIN)/python -m silotune.simulations.benchmarks.dp

install: $(INSTALLED)  ## .venv with the pinned versions

# The editable install links the files it finds, so a new file needs a new install.
.venv/files: FORCE
	@mkdir -p .venv
	@find common client server simulations -name '*.py' -o -name '*.toml' -o -name '*.md' \
	    -o -name '*.j2' -o -path '*/deploy/*' -o -path '*/models/*' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(INSTALLED): pyproject.toml constraints.txt .venv/files
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --config-settings editable_mode=strict -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info runs
