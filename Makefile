# undermesh: every verb of the project is a target here; `make help` lists them.
# Artefacts go to build/ only. V=1 shows the commands.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
Q := $(if $(V),,@)

BUILD := build
VENV := $(BUILD)/venv
PY := $(VENV)/bin/python
PYTREE := $(BUILD)/py/undermesh
export PATH := $(HOME)/.cargo/bin:/usr/sbin:/sbin:$(PATH)
export PYTHONPATH := $(CURDIR)/$(BUILD)/py
export PYTHONDONTWRITEBYTECODE := 1
export CARGO_TARGET_DIR := $(CURDIR)/$(BUILD)/rust
export REPORT ?=
export AGAIN ?= 3

# What needs root gets it from sudo; everything is built as the user who calls make.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=PYTHONPATH,PYTHONDONTWRITEBYTECODE,REPORT,AGAIN,PATH)

# The same for cargo's test programs: namespaces and PID 1 are tested for real.
RUST_AS_ROOT := $(if $(AS_ROOT),--config "target.'cfg(unix)'.runner='sudo --preserve-env=PATH'")

# Tests wait more than they compute: two at a time take half as long, on one core as well.
workers := 2

# Of `make lab`.
nodes := 2
name := lab
mesh := 1

PROTOS := $(wildcard proto/*.proto)
BPF_SOURCES := $(wildcard bpf/*.bpf.c)
BPF_OBJECTS := $(BPF_SOURCES:bpf/%.bpf.c=$(BUILD)/bpf/%.bpf.o)
PACKAGES := agent api cli controlplane lab
ZTUNNEL := $(BUILD)/rust/fast/ztunnel

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18
	@echo; echo 'REPORT=FILE makes demo write its rows as JSON lines; ARGS=... goes to pytest (test-python) or the demo.'

.PHONY: demo
demo: build ## two nodes, real traffic, mTLS: one table that shows what undermesh does (root or sudo)
	$(Q)$(AS_ROOT) $(PY) -m undermesh.lab.demo --build $(BUILD) $(if $(REPORT),--report $(REPORT)) $(ARGS)

.PHONY: lab
lab: build ## keep a Kubernetes cluster up on this machine: nodes=N name=X mesh=0|1 (root or sudo)
	$(Q)$(AS_ROOT) $(BUILD)/undermesh lab up --name $(name) --nodes $(nodes) $(if $(filter 0,$(mesh)),--no-mesh,--mesh)

.PHONY: lab-down
lab-down: ## end it and remove every trace of it, also after a crash: name=X
	$(Q)$(AS_ROOT) $(BUILD)/undermesh lab down --name $(name)

.PHONY: test
test: build test-rust test-python ## every test (root or sudo)

.PHONY: test-python
test-python: build ## Python, BPF and network namespace tests; ARGS='-k name', workers=N (0: one after the other), AGAIN=0: no second look at what failed
	$(Q)$(AS_ROOT) tools/pytest_twice.sh $(PY) -n $(workers) --dist loadscope --no-loadscope-reorder $(ARGS)

.PHONY: soak
soak: build ## pods that come and go, the mesh in and out, many and idle connections, and the table of events x promises (root or sudo)
	$(Q)$(AS_ROOT) env UNDERMESH_AWAY_SECONDS=120 UNDERMESH_CHURN_SECONDS=120 UNDERMESH_CHURN_RATE=20 UNDERMESH_LEAK_PODS=200 UNDERMESH_LEAK_ROUNDS=10 \
	    UNDERMESH_INTEROP_MIB=200 UNDERMESH_INTEROP_IDLE=45 UNDERMESH_E2E_SHORTS=100000 UNDERMESH_E2E_STOPPED=200 UNDERMESH_E2E_IDLE=900 \
	    $(PY) -m pytest tests/mesh tests/interop tests/e2e/test_e2e_many.py $(ARGS)
	$(Q)$(AS_ROOT) $(BUILD)/undermesh lab check --name soak --connections 2400 --seconds 15 $(if $(REPORT),--report $(REPORT))

# What the benchmarks import: their own modules, and what the tests have of Envoy and certificates.
BENCH_PATH := bench:tests/interop:tests/e2e

.PHONY: bench
bench: build ## the byte path beside no mesh and Envoy sidecars: ARGS='--rounds 7 --idle 10000' (root or sudo)
	$(Q)cargo build --locked --release -p ztunnel -p undermesh-load $(if $(V),,--quiet)
	$(Q)PYTHONPATH="$$PYTHONPATH:$(BENCH_PATH)" && $(AS_ROOT) $(PY) -m bytepath --build $(BUILD) $(if $(REPORT),--report $(REPORT)) $(ARGS)

.PHONY: explain
explain: build ## `undermesh explain` against what happens, in thousands of random cases: rounds=N of 12, seed=N (root or sudo)
	$(Q)$(AS_ROOT) env UNDERMESH_EXPLAIN_ROUNDS=$(or $(rounds),250) UNDERMESH_EXPLAIN_SEED=$(or $(seed),1) \
	    $(PY) -m pytest -q tests/e2e/test_e2e_explain.py -k says_what_happens $(ARGS)

.PHONY: bench-enrolment
bench-enrolment: build ## CPU of the agent for each pod that comes, stays and goes: ARGS='--pods 200' (root or sudo)
	$(Q)$(AS_ROOT) $(PY) bench/enrolment.py $(ARGS)

.PHONY: bench-translate
bench-translate: env ## what one change costs the control plane, beside a translation of everything; ARGS='--sizes 500'
	$(Q)$(PY) bench/translate.py $(ARGS)

.PHONY: bench-interop
bench-interop: build ## bulk throughput of ztunnel with Envoy in both roles, as ratios: ARGS='--rounds 9' (root or sudo)
	$(Q)$(AS_ROOT) $(PY) bench/interop.py $(ARGS)

.PHONY: bench-fanout
bench-fanout: env ## what one change costs the control plane per connected agent; ARGS='--clients 100'
	$(Q)$(PY) bench/fanout.py $(ARGS)

.PHONY: test-rust
test-rust: $(BUILD)/.bootstrap ## ztunnel's and the CNI plugin's own tests
	$(Q)cargo test --locked --profile fast --workspace --quiet $(RUST_AS_ROOT)

.PHONY: fuzz
fuzz: $(BUILD)/.bootstrap ## what peers may send to ztunnel's parsers, a million times each: cases=N
	$(Q)PROPTEST_CASES=$(or $(cases),1000000) cargo test --locked --profile fast -p ztunnel --lib --quiet hbone::request

.PHONY: test-kernel
test-kernel: build ## the kernel-facing tests on Debian's 6.1 kernel, under qemu without KVM
	$(Q)tools/test_kernel.sh $(ARGS)

.PHONY: check
check: build ## formatters, linters and types
	$(Q)$(VENV)/bin/ruff format --check --quiet . && $(VENV)/bin/ruff check --quiet .
	$(Q)env -u PYTHONPATH MYPYPATH=$(BUILD)/py $(VENV)/bin/mypy --config-file pyproject.toml $(foreach p,$(PACKAGES),-p undermesh.$(p))
	$(Q)env -u PYTHONPATH MYPYPATH=$(BUILD)/py:$(BENCH_PATH) $(VENV)/bin/mypy --config-file pyproject.toml -p bytepath
	$(Q)cargo fmt --check && cargo clippy --locked --profile fast --workspace --all-targets --quiet -- -D warnings
	$(Q)clang-format --dry-run -Werror bpf/*.c bpf/include/*.h

.PHONY: format
format: $(VENV)/.done ## format every source file
	$(Q)$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format --quiet . ; cargo fmt ; clang-format -i bpf/*.c bpf/include/*.h

.PHONY: build
build: env bpf rust ## everything that the demo and the tests run

.PHONY: env
env: $(VENV)/.done $(PYTREE)/.done ## the Python environment and the generated Python code

.PHONY: bpf
bpf: $(BPF_OBJECTS) ## the BPF objects

.PHONY: rust
rust: $(BUILD)/.bootstrap ## ztunnel and the CNI plugin
	$(Q)cargo build --locked --profile fast --workspace $(if $(V),,--quiet)

.PHONY: release
release: $(BUILD)/.bootstrap ## ztunnel and the CNI plugin as they ship
	$(Q)cargo build --locked --release -p ztunnel
	$(Q)cargo build --locked --release -p undermesh-cni --config cni/.cargo/config.toml \
	    --target "$$(rustc -vV | sed -n 's/^host: //p')"

.PHONY: clean
clean: ## remove build/
	$(Q)rm -rf $(BUILD)

$(BUILD)/.bootstrap: tools/bootstrap.sh
	$(Q)mkdir -p $(BUILD) && tools/bootstrap.sh && touch $@

$(VENV)/.done: requirements.txt requirements-dev.txt requirements-alone.txt | $(BUILD)/.bootstrap
	@echo 'python: installing into $(VENV)'
	$(Q)"$$(tools/find_python.sh)" -m venv --clear $(VENV) && $(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(Q)$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-alone.txt
	$(Q)touch $@

$(PYTREE)/.done: $(PROTOS) proto/marks.toml tools/generate_marks.py $(VENV)/.done Makefile
	$(Q)rm -rf $(PYTREE) && mkdir -p $(PYTREE)/gen $(PYTREE)/proto && touch $(PYTREE)/gen/__init__.py $(PYTREE)/proto/__init__.py
	$(Q)for p in $(PACKAGES); do ln -s ../../../$$p $(PYTREE)/$$p; done
	$(Q)printf '#!/bin/sh\nPYTHONPATH=%s PYTHONDONTWRITEBYTECODE=1 exec %s -m undermesh.cli "$$@"\n' \
	    '$(CURDIR)/$(BUILD)/py' '$(CURDIR)/$(PY)' > $(BUILD)/undermesh && chmod +x $(BUILD)/undermesh
	$(Q)$(PY) tools/generate_marks.py proto/marks.toml $(BUILD)/gen/marks.h $(PYTREE)/gen/marks.py
	$(Q)cd $(BUILD) && PATH="$(CURDIR)/$(VENV)/bin:$$PATH" venv/bin/python -m grpc_tools.protoc -Iundermesh/proto=../proto \
	    --python_out=py --grpc_python_out=py --mypy_out=quiet:py --mypy_grpc_out=quiet:py \
	    $(PROTOS:proto/%=undermesh/proto/%)
	$(Q)touch $@

$(BUILD)/gen/marks.h: $(PYTREE)/.done
	$(Q)touch $@

# `make bpf` compiles; nothing on a node ever does.
$(BUILD)/bpf/%.bpf.o: bpf/%.bpf.c $(wildcard bpf/include/*.h) $(BUILD)/gen/marks.h | $(BUILD)/.bootstrap
	$(Q)mkdir -p $(@D) && clang -O2 -g -target bpf -mcpu=v3 -Wall -Wtype-limits -Werror \
	    -I/usr/include/$$(uname -m)-linux-gnu -I$(BUILD)/gen -Ibpf/include -c $< -o $@
	$(Q)llvm-strip -g $@
