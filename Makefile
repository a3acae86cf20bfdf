# Every target builds what it needs, from nothing, with the exact versions of constraints/locked.txt, in an environment of its
# own. torch comes first, so that a machine without a GPU does not fetch GPU packages.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BUILD := "pip>=23.2" "setuptools>=77"
DEVELOPMENT := dev,docs
LOCKED := constraints/locked.txt
OLDEST := constraints/oldest.txt
# Each process begins with a stretch of whole files, whose tests share what they make, and takes from the end of another's
# stretch when its own is done.
PYTEST := -m pytest -n logical --maxprocesses 8 --dist worksteal
export OMP_NUM_THREADS ?= 1
# Tests start many processes, which would compile the package each for itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check docs test-newest test-oldest constraints clean

demo: .venv/.demo
	.venv/bin/python examples/demo.py

test: .venv/.dev
	.venv/bin/python $(PYTEST)

check: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/.docs
	.venv/bin/mkdocs build --strict

# The newest release of everything that pyproject.toml allows, and the oldest, torch included: it comes for GPUs, some
# gigabytes, unless pip is set up to find releases for CPUs.
test-newest test-oldest: TORCH = torch

test-newest:
	$(call install,.venv-newest,dev,--upgrade --upgrade-strategy eager)
	.venv-newest/bin/python -m pip freeze --all
	.venv-newest/bin/python $(PYTEST)

test-oldest:
	$(call install,.venv-oldest,dev,-c $(OLDEST))
	.venv-oldest/bin/python -m pip freeze --all
	.venv-oldest/bin/python $(PYTEST)

# Writes both files anew from the package index; run the tests before they are committed.
constraints:
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(call compile,$(TORCH),--universal --extra dev --extra docs) > $(LOCKED).new
	$(call compile,torch,--resolution lowest-direct --extra dev) > $(OLDEST).new
	mv $(LOCKED).new $(LOCKED)
	mv $(OLDEST).new $(OLDEST)
	rm -r .venv-constraints

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-constraints build site *.egg-info

# Arguments: folder of the environment, extras, options of pip. The package is built by the installed setuptools, not by the
# newest one, as pip would by itself.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3) $(BUILD)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3) $(TORCH)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3) $(TORCH) --no-build-isolation -e ".[$(2)]"
endef

# Arguments: the release of torch, options of uv.
compile = printf '%s\n' "$(1)" $(BUILD) | .venv-constraints/bin/uv pip compile --quiet --python-version 3.11 \
	--no-annotate --custom-compile-command "make constraints" $(2) pyproject.toml -

.venv/.demo: pyproject.toml $(LOCKED)
	$(call install,.venv,demo,-c $(LOCKED))
	touch $@

.venv/.dev: pyproject.toml $(LOCKED)
	$(call install,.venv,$(DEVELOPMENT),-c $(LOCKED))
	touch $@

.venv/.docs: pyproject.toml $(LOCKED)
	$(call install,.venv,docs,-c $(LOCKED))
	touch $@
