# SPDX-License-Identifier: Apache-2.0
# Short names for the few commands; what they do is in tools/ and in the package.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Processes that share the suite; the tests of one file stay together.
JOBS ?= auto
TEST = $(RUN) -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile --durations 20 tests

.DEFAULT_GOAL := help
.PHONY: help setup run test test-head detectron2-given lint docs ext benchmark wheel clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-10s  %s\n", $$1, $$2 }'

setup:  ## make .venv with torch, Detectron2 and this package (PYTHON=python3.12 chooses one)
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --dev

run: setup  ## train FCOS on 48 real images, evaluate, and draw what it finds
	$(RUN) -m d2_decouple.quickstart

test: setup  ## the whole test suite (JOBS=1: in one process)
	$(TEST)

test-head: detectron2-given setup  ## the suite with another Detectron2: DETECTRON2=DIR, a checkout
	PYTHONPATH="$(abspath $(DETECTRON2))" $(RUN) -c \
	  "import detectron2; print('Detectron2', detectron2.__version__, 'in', detectron2.__path__[0])"
	PYTHONPATH="$(abspath $(DETECTRON2))" $(TEST)

detectron2-given:
	@test -f "$(abspath $(DETECTRON2))/detectron2/__init__.py" || { \
	  echo "There is no Detectron2 in '$(DETECTRON2)'. Type: make test-head DETECTRON2=DIR, where" \
	    "DIR is a checkout of Detectron2 and so has a file detectron2/__init__.py." >&2; exit 2; }

lint: setup  ## ruff, mypy and clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

docs: setup  ## build the documentation site into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

ext: | $(VENV)  ## compile csrc/ again after a change (MAX_JOBS=1 where memory is small)
	D2D_BUILD_EXT=1 $(RUN) tools/build_extension.py

$(VENV):
	@$(MAKE) setup

benchmark: setup  ## measure this code and its references side by side
	$(RUN) tools/benchmark.py

wheel: setup  ## build a wheel into dist/ (D2D_BUILD_EXT=0: without compiled operators)
	$(RUN) -m build --wheel --no-isolation --outdir dist

clean:  ## delete what was built; .venv, output/ and datasets/ stay
	rm -rf build dist site *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
