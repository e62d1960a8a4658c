# make demo and make test set up what they need: a virtual environment in .venv with Python 3.10 or 3.11 and PyTorch's
# CPU build. Name another interpreter with PYTHON=..., an environment of your own with VENV=...
PYTHON ?= python3
VENV ?= .venv
VENV312 ?= .venv312
RUN = $(VENV)/bin/python
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check
PIP312 = $(VENV312)/bin/python -m pip install -q --disable-pip-version-check

.PHONY: demo test test-megatron bench setup clean help

help:
	@echo "make demo           pre-train a small GPT with AdamW, BlockwiseAdamW and BlockwiseAdamMini (6 minutes)"
	@echo "make test           run the tests"
	@echo "make bench          measure optimizer steps side by side"
	@echo "make clean          remove the environments and what the demo wrote"

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "blockwise-lr needs Python 3.10 to 3.12; name one with make PYTHON=python3.11"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) \
	  || { echo "this Python has no venv module; install it (Debian: apt install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e ".[deepspeed,transformers,examples,test]"
	@touch $@

demo: setup
	@$(RUN) examples/demo/run.py

test: setup
	@$(RUN) -m pytest tests

bench: setup
	@$(RUN) tests/bench/step.py

clean:
	rm -rf $(VENV) $(VENV312) runs
