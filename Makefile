# Needs Python 3.10 to 3.13, git and make; everything else goes into .venv.
#   PYTHON=python3.12   the Python that .venv is made with
#   TORCH_INDEX=URL     another index for torch and torchvision, such as the one with CPU-only builds
#   ARGS="..."          passed on to the command behind digits, tour, test, lint, bench, cifar10, gpu and notebooks

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
METADATA := settings.ini pyproject.toml setup.py

.DEFAULT_GOAL := help
.PHONY: help digits tour test lint mutants bench cifar10 gpu lab method notebooks export docs clean

help: ## list these targets
	@sed -n 's/^\([a-z0-9]*\):.*## /make \1|/p' Makefile | awk -F'|' '{ printf "  %-15s %s\n", $$1, $$2 }'
	@sed -n 's/^#   /  /p' Makefile

digits: .venv/installed ## draw guided digits into digits.png with a trained model, in seconds
	@$(BIN)/guidance-nb sample mnist-cfg --scale 3 --n 50 --out digits.png --overwrite $(ARGS)

tour: .venv/installed ## all methods side by side
	@$(BIN)/guidance-nb tour $(ARGS)

test: .venv/installed-dev ## run all tests, the notebooks and what lint checks included
	@$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-dev ## check the form alone, quickly; ARGS=--fix writes what can be written
	@$(BIN)/python tools/lint.py $(ARGS)

mutants: .venv/installed-dev ## break the core in many ways, and count what the tests notice
	@$(BIN)/python tools/mutants.py $(ARGS)

bench: .venv/installed-bench ## time against peers and goals, and save the ratios
	@$(BIN)/python tools/bench.py $(ARGS)

cifar10: .venv/installed ## measure the papers' claims on CIFAR-10: one GPU, ARGS="--budget MINUTES"
	@$(BIN)/python tools/cifar10.py $(ARGS)

method: .venv/created ## begin a method's notebook: NAME=my_idea NUMBER=40
	@$(BIN)/python tools/method.py $(NAME) $(NUMBER)

gpu: .venv/installed-dev ## all that wants a GPU, in a quarter of an hour: ARGS="--budget MINUTES"
	@$(BIN)/python tools/gpu.py $(ARGS)

lab: .venv/installed-dev ## edit the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

export: .venv/installed-dev ## write guidance_nb/, README.md and the API page from the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/readme.py
	@$(BIN)/python tools/api.py

notebooks: export ## execute the notebooks and store their outputs
	@$(BIN)/python tools/refresh.py $(ARGS)

docs: export ## build the site into _docs/ (needs Quarto 1.9)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.9: https://quarto.org/docs/download/" >&2; exit 1; }
	@$(BIN)/python -c "from guidance_nb.explorer import digits_page; digits_page('nbs/digits')"
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/tools" $(BIN)/nbdev_docs

clean: ## remove what was built; keeps .venv
	rm -rf _proc _docs build dist guidance_nb.egg-info nbs/nbdev.yml nbs/digits .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamps below are files, so a second call starts at once; a change of the metadata installs again.

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "Python 3.10 to 3.13 is needed, and $(PYTHON) is not that: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot create virtual environments: install its venv package (python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@touch $@

# torch and torchvision are built for each other, so they come first, together, from one place.
.venv/installed: .venv/created $(METADATA)
	@echo "Installing guidance_nb into .venv; the first time this takes minutes." >&2
	@$(PIP) torch torchvision $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) --editable '.[cli]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need into .venv." >&2
	@$(PIP) --editable '.[dev]'
	@touch $@

.venv/installed-bench: .venv/installed
	@echo "Installing what the benchmarks compare with into .venv." >&2
	@$(PIP) --editable '.[bench]'
	@touch $@
