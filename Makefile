# make quickstart   the Alpaca recipe on this machine, in miniature: train, save, reload, answer
# make test         the test suite (under 10 minutes on 2 cores); test-fast: under 1; stress: as long as it takes
# make lint         ruff
#
# Everything is installed into .venv. Another interpreter: make PYTHON=python3.12 quickstart

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PYTEST := $(RUN)/python -m pytest

.PHONY: help install quickstart test test-fast stress lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

# DeepSpeed and lm-eval in folders of their own, which their tests alone look into: accelerate would load the one, and
# transformers scipy, which comes with the other, wherever they are imported
$(VENV)/.installed-tests: $(VENV)/.installed $(wildcard tests/requirements*.txt)
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements.txt
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements-deepspeed.txt \
		--no-deps --upgrade --target $(VENV)/deepspeed
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements-evaluate.txt \
		--no-deps --upgrade --target $(VENV)/evaluation
	@touch $@

quickstart: $(VENV)/.installed
	$(RUN)/python -m scripts.quickstart

test: $(VENV)/.installed-tests
	$(PYTEST) -n 2 -m "not stress"

test-fast: $(VENV)/.installed-tests
	$(PYTEST) -n 2 -m "not slow and not stress"

stress: $(VENV)/.installed-tests
	$(PYTEST) -m stress

lint: $(VENV)/.installed-tests
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

clean:
	rm -rf $(VENV) quickstart
