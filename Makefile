# make demo · make test · make test-vllm · make smoke-vllm · make lint · make crd · make bench-engine · make bench-kernels · make bench-rpc · make bench-vllm · make bench-carriers · make bench-pipeline · make bench-serve · make bench-router · make load-test · make fuzz · make fuzz-api      (a second time each is quick)
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_MODEL := smollm2-135m

export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: model demo test test-vllm smoke-vllm lint proto crd bench-engine bench-kernels bench-rpc bench-vllm bench-carriers bench-pipeline bench-serve bench-router load-test fuzz fuzz-api clean

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; give another with PYTHON=python3.x (3.11 to 3.13)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

# torch is named first: without the pin a resolver takes the newest one, with gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml $(BIN)/python
	$(PIP) install --quiet --only-binary :all: "torch>=2.11,<2.14" "transformers==5.19.0" "ray[default]==2.60.0"
	$(PIP) install --quiet --editable ".[ray,k8s,server,operator,client,otel,parity,test]"
	touch $@

# The demo model, which tests marked "demo" need.
model: $(VENV)/installed
	$(BIN)/lightvllm models get $(DEMO_MODEL)

demo: model
	$(BIN)/lightvllm parity $(DEMO_MODEL) --executors uniproc,ray,k8s --layouts 1x1,1x2,3x1

test: $(VENV)/installed lint
	$(BIN)/python -m pytest

# Our executors under vLLM itself, its CPU build: a quarter of an hour; smoke-vllm, a part of them: half of that.
test-vllm smoke-vllm: model
	$(BIN)/python benchmarks/install_vllm.py .venv-vllm
	.venv-vllm/bin/python -m pytest -m $(if $(filter smoke%,$@),smoke,vllm) $(wildcard tests/test_vllm_*.py)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(VENV)/installed
	$(BIN)/python proto/generate.py

# manifests/base/crd.yaml and the tables of docs/kubernetes.md, from lightvllm/operator/types.py.
crd: $(VENV)/installed
	$(BIN)/python manifests/generate.py

# Our engine, transformers and vLLM's CPU build on the same weights, interleaved.
bench-engine: model
	$(BIN)/python benchmarks/install_vllm.py .venv-vllm
	$(BIN)/python benchmarks/engine.py $(DEMO_MODEL) --vllm-python .venv-vllm/bin/python

# The compiled CPU kernels against torch's, interleaved.
bench-kernels: $(VENV)/installed
	$(BIN)/python benchmarks/kernels_cpu.py

# The round trip of a no-op call to N workers: ours, Ray's, vLLM's, and bare sockets, interleaved.
bench-rpc: $(VENV)/installed
	$(BIN)/python benchmarks/install_vllm.py .venv-vllm
	$(BIN)/python benchmarks/rpc.py --vllm-python .venv-vllm/bin/python --growth

# vLLM's CPU build on its own executors and on ours, interleaved.
bench-vllm: model
	$(BIN)/python benchmarks/install_vllm.py .venv-vllm
	.venv-vllm/bin/python benchmarks/vllm_executors.py $(DEMO_MODEL)

# What the wire's design chose, each against its alternatives, interleaved.
bench-carriers: $(VENV)/installed
	$(BIN)/python benchmarks/carriers.py

# Two pipeline stages under each transport, against one process and against Ray, interleaved.
bench-pipeline: model
	$(BIN)/python benchmarks/pipeline.py $(DEMO_MODEL)
	$(BIN)/python benchmarks/pipeline.py $(DEMO_MODEL) --hand-over

# Our server, vLLM's, and our engine without a server under the same streams, interleaved.
bench-serve: model
	$(BIN)/python benchmarks/install_vllm.py .venv-vllm
	$(BIN)/python benchmarks/serve.py compare $(DEMO_MODEL) --vllm-python .venv-vllm/bin/python --greedy

# What the router adds to a request and to an event of a stream: through it and directly, interleaved.
bench-router: $(VENV)/installed
	$(BIN)/python benchmarks/router.py

# 200 streams for five minutes, of which every tenth client vanishes: nothing is lost, mixed up or left behind.
load-test: model
	$(BIN)/python benchmarks/serve.py load-test $(DEMO_MODEL)

# 100,000 hostile inputs to a worker's listeners; a small part of them is in the tests.
fuzz: $(VENV)/installed
	$(BIN)/python benchmarks/fuzz.py

# 5,000 requests of every kind to lightvllm serve; a small part of them is in the tests.
fuzz-api: $(VENV)/installed
	$(BIN)/python benchmarks/fuzz_api.py

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
