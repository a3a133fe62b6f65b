# `make run` and `make test` work on a fresh machine with Python >= 3.11, pip and make; `make help` lists the rest.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What is fetched is checked by its hash, but PyTorch, whose build is the machine's choice. `make LOCKED= ...` checks the
# versions alone, where an index has builds of its own.
LOCKED ?= 1
# Extra arguments: make run ARGS="--epochs 2", make serve ARGS="--port 50052", make test ARGS="-k batcher"
ARGS   ?=
NODE_EXAMPLE := client/examples/node

# Tests run on several cores, a file at a time each, in the order of tests/conftest.py; one thread in PyTorch, or the
# processes fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
CORES  := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run serve test test-all test-ladder test-faults test-envoy fuzz crash bench bench-gpu overload soak lint format protos protos-released test-protobuf7 test-compose node lock audit build clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vaeserve needs Python >= 3.11; $(PYTHON) is `$(PYTHON) -V 2>&1`. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Could not make $(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

INSTALL = $(BIN)/pip install -q -c constraints.txt $(if $(LOCKED),--no-build-isolation)

$(VENV)/.user: $(BIN)/python pyproject.toml constraints.txt training/requirements.txt
	@echo "Installing vaeserve and what it stands on into $(VENV) (PyTorch and ONNX Runtime are large; minutes) ..."
	@$(if $(LOCKED),$(BIN)/pip install -q --require-hashes --no-deps -r training/requirements.txt)
	@$(INSTALL) -e '.[cli,server,training]'
	@touch $@

$(VENV)/.dev: $(VENV)/.user .ci/requirements.txt
	@echo "Installing the development tools into $(VENV) ..."
	@$(if $(LOCKED),$(BIN)/pip install -q --require-hashes --no-deps -r .ci/requirements.txt)
	@$(INSTALL) -e '.[dev]'
	@touch $@

run: $(VENV)/.user ## Train (once), export, serve, and take the SDK's tour: runs/quickstart/
	@$(BIN)/python client/examples/quickstart.py $(ARGS)

serve: $(VENV)/.user ## Serve ./models on 127.0.0.1:50051
	@$(BIN)/vaeserve-server $(ARGS)

test: $(VENV)/.dev ## Lint, types and the test suite, but for the jobs below (with ARGS: whatever they name)
	@$(MAKE) --no-print-directory style
	@! command -v npm >/dev/null || $(MAKE) --no-print-directory node || echo "The Node.js example is not tested." >&2
	@$(MAKE) --no-print-directory -j2 types suite

.PHONY: style types suite
suite: $(VENV)/.dev
	@$(PYTEST) $(CORES) $(or $(ARGS),-m "not ladder and not faults and not envoy")

test-all: $(VENV)/.dev ## Lint, types and every test, in one
	@$(MAKE) --no-print-directory test ARGS=tests

test-ladder: $(VENV)/.dev ## The tests that train the ladder's systems, fitted priors and the preset large
	@$(PYTEST) $(CORES) -m ladder $(ARGS)

test-faults: $(VENV)/.dev ## The tests that kill, flood, fuzz, reload and measure servers, and watch whole lives
	@$(PYTEST) $(CORES) -m faults $(ARGS)

bench: $(VENV)/.user ## How fast ./models is served, in ratios: runs/bench/results.json (ARGS="--quick" for a smoke)
	@$(BIN)/python tests/benchmarks/bench.py $(ARGS)

bench-gpu: $(VENV)/.user ## The same on a GPU, where there is one: runs/bench/results-gpu.json
	@$(BIN)/python tests/benchmarks/bench.py --device cuda $(ARGS)

soak: $(VENV)/.dev ## Everything at once for 3 minutes: load, reloads, kills, bad input (ARGS="--minutes 60 --transport envoy")
	@$(BIN)/python tests/soak/soak.py $(ARGS)

overload: $(VENV)/.dev ## What 3 times as many calls as ./models can take do to the server, for a minute (ARGS="--seconds 5")
	@$(BIN)/python tests/benchmarks/overload.py $(ARGS)

lint: style types ## ruff, mypy --strict, buf

types: $(VENV)/.dev
	@$(BIN)/mypy

style: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/buf lint protos
	@$(BIN)/buf breaking protos --against protos/released.binpb

format: $(VENV)/.dev ## Format and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: $(VENV)/.dev ## Generate client/vaeserve/v1 from protos/
	@$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=client --pyi_out=client --grpc_python_out=client \
	  protos/vaeserve/v1/vae.proto

protos-released: $(VENV)/.dev ## Record today's contract as the one that must not break
	@$(BIN)/buf build protos -o protos/released.binpb

test-envoy: $(VENV)/.dev ## The server's and the client's tests with the server behind Envoy
	@$(PYTEST) $(CORES) --transport envoy tests/server tests/client $(ARGS)

fuzz: $(VENV)/.dev ## Hostile requests to every RPC, 200 000 unless told (ARGS="20000 --transport envoy")
	@PYTHONPATH=tests:tests/server $(BIN)/python tests/server/fuzz.py $(ARGS)

crash: $(VENV)/.dev ## Kill the trainer at 20 moments, the ladder in each step, the exporter at every file operation; fill disks
	@VAESERVE_CRASHES=20 $(BIN)/python -m pytest -rP \
	  tests/training/test_crash.py tests/training/test_ladder_full.py tests/training/test_disks.py $(ARGS)

test-protobuf7: ## The SDK alone, in an environment of its own with protobuf 7
	@rm -rf .venv-protobuf7 && $(PYTHON) -m venv .venv-protobuf7
	@.venv-protobuf7/bin/pip install -q . 'protobuf>=7' 'grpcio-health-checking>=1.85'
	@.venv-protobuf7/bin/python tests/smoke_sdk.py

test-compose: $(VENV)/.dev ## The containers for real: build, train, serve, call, restart, down (needs a docker engine)
	@docker info >/dev/null && docker compose version >/dev/null || \
	  { echo "make test-compose needs a docker engine (docker info must work) with compose v2" >&2; exit 1; }
	@VAESERVE_TEST_COMPOSE=1 $(PYTEST) tests/deploy/test_compose.py $(ARGS)

node: $(NODE_EXAMPLE)/node_modules/.package-lock.json ## What the Node.js example and its test need, as locked (npm)

$(NODE_EXAMPLE)/node_modules/.package-lock.json: $(NODE_EXAMPLE)/package.json $(NODE_EXAMPLE)/package-lock.json
	@npm ci --prefix $(NODE_EXAMPLE) --ignore-scripts --no-audit --no-fund

lock: ## Pin every dependency with its hashes anew, from pyproject.toml and constraints.txt (network)
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q uv
	@.ci/lock .venv-lock/bin/uv

audit: ## Ask public databases for known vulnerabilities of what is pinned (network; not part of CI)
	@$(PYTHON) -m venv .venv-audit && .ci/audit .venv-audit

build: $(VENV)/.dev ## Wheel and sdist into dist/
	@$(BIN)/python -m build --no-isolation

clean: ## Remove environments and caches; models/ and runs/ stay
	@rm -rf .venv .venv-protobuf7 .venv-lock .venv-audit .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build $(NODE_EXAMPLE)/node_modules
