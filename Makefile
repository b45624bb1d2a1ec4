# Everything sets itself up: a fresh clone needs Python 3.11 to 3.13, pip and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
E2E     := .venv-e2e
E2E_031 := .venv-e2e-031

BENCH_ARGS  ?=
PYTEST_ARGS ?=
TRACE       ?=
REPLAY_ARGS ?= --workers 2 --requests 2000 --json

# Benchmarks that need a GPU are named gpu_*, those that need vLLM vllm_*, what they share _*.
BENCHMARKS := $(filter-out benchmarks/gpu_% benchmarks/vllm_% benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))

# The nightly parts; each is a target of its own, nightly-<part>. The trace is not ours to ship.
PARTS := index feed install ssd vllm dynamo trace
PART  ?= index feed install ssd$(if $(TRACE), trace)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint e2e e2e-dynamo e2e-envs bench bench-vllm bench-dynamo nightly $(PARTS:%=nightly-%) clean

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1 - \2/p' Makefile
	@echo "nightly parts: $(PARTS)"

demo: $(VENV)/.demo ## Two workers, a real router and a NATS server on this machine, in about a minute
	$(BIN)/flexkv demo

test: $(VENV)/.dev ## The tests (PYTEST_ARGS="-k eviction" for some of them)
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

e2e: e2e-envs ## Real vLLM 0.32 and 0.31, with flexkv and without (PYTEST_ARGS="-k tiny" for some)
	$(E2E)/bin/pytest -c tests/e2e/pytest.ini -n 2 --dist loadgroup -m "not nightly" tests/e2e $(PYTEST_ARGS)

e2e-dynamo: $(E2E_031)/.made ## A whole Dynamo deployment by flexkv launch, its processes killed (PYTEST_ARGS="-k nats -s" for some)
	$(E2E_031)/bin/python -m pytest -c tests/deployment/pytest.ini -m "not nightly" tests/deployment $(PYTEST_ARGS)

e2e-envs: # side by side: most of it is waiting
	@printf '%s\n' $(E2E)/.made $(E2E_031)/.made | xargs -P 2 -n 1 $(MAKE)

bench: $(VENV)/.dev ## Every benchmark that needs no GPU (BENCH_ARGS="--quick --json")
	@failed=; for program in $(BENCHMARKS); do \
		echo "+ $$program $(BENCH_ARGS)" >&2; \
		$(BIN)/python $$program $(BENCH_ARGS) || failed="$$failed $$program"; \
	done; \
	if [ -n "$$failed" ]; then echo "missed a target:$$failed" >&2; exit 1; fi

bench-vllm: $(E2E)/.made ## What flexkv costs and saves in a real vLLM (BENCH_ARGS="--quick --json")
	$(E2E)/bin/python benchmarks/vllm_overhead.py $(BENCH_ARGS)

bench-dynamo: $(E2E_031)/.made ## What flexkv saves behind Dynamo's router, with CPUs for GPUs (BENCH_ARGS="--quick --json")
	$(E2E_031)/bin/python benchmarks/vllm_routing.py $(BENCH_ARGS)

nightly: $(PART:%=nightly-%) ## The long tests: all parts, or PART=index, say
	@echo "passed: $(PART)$(if $(TRACE),,; the part trace needs TRACE=file.jsonl)"

nightly-index: $(VENV)/.dev ## 100,000 steps of the index against its model, 1,000 seeds of the engine
	FLEXKV_HYPOTHESIS=nightly $(BIN)/pytest --timeout=0 tests/engine/test_index_model.py \
	  tests/engine/test_engine_simulation.py $(PYTEST_ARGS)

nightly-feed: $(VENV)/.dev ## 2,000 seeds of the feed through a lossy proxy, 30 of an engine with SSD, 200 with killed processes (half an hour)
	$(BIN)/pip install -q --no-deps ai-dynamo==1.6.1
	FLEXKV_FEED_FUZZ=nightly $(BIN)/pytest --timeout=0 tests/dynamo/test_fuzz.py \
	  tests/dynamo/test_fuzz_engine.py tests/dynamo/test_fuzz_kills.py tests/dynamo/test_frontend.py $(PYTEST_ARGS)

nightly-install: ## flexkv beside vLLM and Dynamo changes none of their packages (4 GB of disk for a while)
	tests/install/check_install.sh vllm $(PYTHON)
	tests/install/check_install.sh dynamo $(PYTHON)

nightly-ssd: $(VENV)/.dev ## 200 times kill -9, 300 seeds of failing disks; with TRACE=file.jsonl hits, and a router's belief after a restart
	FLEXKV_HYPOTHESIS=nightly TRACE=$(TRACE) $(BIN)/pytest --timeout=0 tests/engine/test_disk_crashes.py \
	  tests/engine/test_disk_simulation.py tests/replay/test_disk_hits.py $(PYTEST_ARGS)
	$(if $(TRACE),$(BIN)/flexkv replay $(TRACE) --ssd-blocks 24000 --restart --json)

nightly-vllm: $(E2E)/.made $(E2E_031)/.made ## vLLM's schedulers, 0.33's too, for long (0.5 GB to fetch)
	tests/e2e/unpack_033.sh $(E2E) .venv-e2e-033
	$(E2E)/bin/pytest -c tests/e2e/pytest.ini -m nightly tests/e2e $(PYTEST_ARGS)

nightly-dynamo: $(E2E_031)/.made ## The deployment with both feeds in full, data parallelism and etcd (17 minutes)
	$(E2E_031)/bin/python -m pytest -c tests/deployment/pytest.ini -s tests/deployment $(PYTEST_ARGS)

nightly-trace: $(VENV)/.demo ## A trace in the Mooncake format, TRACE=file.jsonl, byte by byte
	@test -n "$(TRACE)" || { echo "nightly-trace replays TRACE=file.jsonl: which one?" >&2; exit 2; }
	$(BIN)/flexkv replay $(TRACE) $(REPLAY_ARGS)

clean: ## Removes the virtual environment, caches and builds
	rm -rf $(VENV) $(E2E) $(E2E_031) .venv-e2e-033 build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Stamps: what is installed is renewed when pyproject.toml or constraints.txt changes, only then.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,lint]'
	@touch $@ $(VENV)/.demo

E2E_NEEDS := pyproject.toml tests/e2e/make_env.sh

$(E2E)/.made: $(E2E_NEEDS) $(wildcard tests/install/vllm*.txt) tests/e2e/requirements-vllm.txt
	tests/e2e/make_env.sh vllm $(E2E) $(PYTHON)
	@touch $@

$(E2E_031)/.made: $(E2E_NEEDS) $(wildcard tests/install/dynamo*.txt) tests/e2e/requirements-dynamo.txt
	tests/e2e/make_env.sh dynamo $(E2E_031) $(PYTHON)
	@touch $@
