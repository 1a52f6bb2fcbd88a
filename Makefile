# What a person types. Everything here runs on a fresh Debian machine with Rust: what is missing is installed by
# root, or the exact command is printed for somebody else. Decisions live in the programs, not here.

SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help

# One build profile serves `up` and the tests.
PGHERD := $(or $(CARGO_TARGET_DIR),target)/debug/pgherd
ARGS ?=

# Schedules of the simulator: enough to meet every broken rule once, few enough for every push.
SIM_SCHEDULES ?= 2000
SIM_SCHEDULES_FULL ?= 50000
# Executions of each target of the fuzzer. The tests have some of their own.
FUZZ_EXECUTIONS ?= 10000000
FUZZ_EXECUTIONS_FULL ?= 1000000

.PHONY: help up down build dist test test-full fuzz verify fix packages packages-for-tests

help:
	@echo 'make up         a herd of three PostgreSQL nodes on this machine (ARGS=--detach leaves it running)'
	@echo 'make down       stop it (ARGS=--delete removes it, and asks first)'
	@echo 'make dist       the program as it is to be shipped, built twice; says where it is'
	@echo 'make test       verify, simulate and run the tests; at most 25 minutes once compiled'
	@echo 'make test-full  everything there is; goes on where it was interrupted'
	@echo 'make fuzz       bytes of every kind for the proxy; half an hour (FUZZ_EXECUTIONS=1000000 is shorter)'
	@echo 'make fix        format and regenerate what "make test" would refuse'

up: packages build
	@$(PGHERD) up $(ARGS)

down: build
	@$(PGHERD) down $(ARGS)

build:
	@cargo build --locked -p pgherd

dist: packages
	@bash bench/profiled

packages:
	@bash .ci/packages up

packages-for-tests:
	@bash .ci/packages test
	@bash .ci/conformance

verify:
	@cargo run --locked -q -p xtask -- verify

fix:
	@cargo run --locked -q -p xtask -- fix
	@PGHERD_UPDATE_GOLDEN=1 cargo test --locked -q -p pgherd --test it golden

test: packages-for-tests
	@SIM_SCHEDULES=$(SIM_SCHEDULES) bash .ci/test quick

test-full: packages-for-tests
	@SIM_SCHEDULES=$(SIM_SCHEDULES_FULL) FUZZ_EXECUTIONS=$(FUZZ_EXECUTIONS_FULL) bash .ci/test full

fuzz:
	@cargo run --locked -q --release -p fuzz -- --executions $(FUZZ_EXECUTIONS)
