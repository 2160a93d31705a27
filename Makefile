# What a new user types: make demo, make test. Both set up .venv with pip from the package registry.
TASK ?= segmentation
SEEDS ?= 1
PYTHON ?= python3
BIN := .venv/bin
ifeq ($(TASK),detection)
INSTALLED := .venv/installed-mmdet
TEACHER := digit_scenes_teacher_detection
else
INSTALLED := .venv/installed
TEACHER := digit_scenes_teacher
endif
# One thread a process: more of them on few shared cores get in each other's way.
export OMP_NUM_THREADS := 1
# A file of tests at a time in each process, one process for each core.
WORKERS := -n auto --maxprocesses 8 --dist loadfile
# MMDetection's maintained fork has the import names of the original, and so an environment of its own.
FORK := .venv-onedl/bin
FORKED := 'onedl-mmdetection>=3.5.1,<4' 'onedl-mmcv>=2.3.6,<3' 'onedl-mmengine>=0.10.12,<1' 'faster-coco-eval>=1.6'

.PHONY: demo test test-fast test-onedl check teacher clean help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: $(INSTALLED) ## baseline and three distillers on DigitScenes: table and picture in minutes (SEEDS=3, TASK=detection)
	@$(BIN)/kdlvfm demo --task $(TASK) --seeds $(SEEDS)

test: .venv/installed-dev ## all tests
	$(BIN)/python -m pytest $(WORKERS)

test-fast: .venv/installed-dev ## the tests that take seconds
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-onedl: .venv-onedl/installed ## the tests of detectors on MMDetection's maintained fork
	$(FORK)/python -m pytest $(WORKERS) tests/models/test_mm*.py tests/tasks tests/cli/test_detection*.py \
		tests/cli/test_every_distiller_on_boxes.py

check: .venv/installed-dev ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

teacher: $(INSTALLED) ## pre-train the demo's teacher again (about an hour on one core; TASK=detection)
	$(BIN)/kdlvfm train experiment=$(TEACHER)

clean: ## remove the environment (runs stay)
	rm -rf .venv .venv-onedl

.venv/bin/python .venv-onedl/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kdlvfm needs Python 3.10 or newer; set PYTHON=python3.12, for example.")'
	@$(PYTHON) -m venv $(@:/bin/python=)

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing kdlvfm and what it needs into .venv; torch alone takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --progress-bar off -e '.[train]'
	@touch $@

.venv/installed-mmdet: pyproject.toml | .venv/installed
	@echo "Installing MMDetection into .venv ..."
	@$(BIN)/python -m pip install --quiet --progress-bar off -e '.[mmdet]'
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/installed
	@echo "Installing the tools of the tests into .venv ..."
	@$(BIN)/python -m pip install --quiet --progress-bar off -e '.[dev]'
	@touch $@

.venv-onedl/installed: pyproject.toml | .venv-onedl/bin/python
	@echo "Installing kdlvfm with the fork of MMDetection into .venv-onedl; torch alone takes some minutes ..."
	@$(FORK)/python -m pip install --quiet --upgrade pip
	@$(FORK)/python -m pip install --quiet --progress-bar off -e '.[train]' $(FORKED) \
		pycocotools pytest pytest-timeout pytest-xdist
	@touch $@
