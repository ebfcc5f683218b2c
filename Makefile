# What a person does, and what CI does: the same commands.
#
#   make demo    a whole cluster on this machine that loses a host and brings its VMs back
#   make test    every test, with real etcd and real QEMU guests
#   make chaos   faults at random on real processes: MINUTES=10 SEED=...; `target/release/uncloud-chaos trials` for one kind,
#                `migration-faults` for what can go wrong in a migration
#   make lint    formatting, clippy, the protocol files
#   make sim     the simulation over many seeds: SEEDS=10000 FROM=1
#   make mutants breaks each safety rule in turn, and says whether a test notices
#   make bench   the numbers, as a table and in target/bench.json
#   make bench-scale  those of 10,000 hosts and 100,000 VMs, in target/bench-scale.json: docs/performance.md; make churn CHURN_MINUTES=60
#   make tour    what an operator does with a VM, typed into a real cluster with a Debian guest: docs/tour.md (CHECK=yes: compares)
#
# Each of them first installs what is missing (make setup) and says what that is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
GUESTS := target/guests

.PHONY: help
help:
	@sed -n 's/^#   make/  make/p' Makefile

# Packages, the guests' kernel (unpacked under target, never installed) and the tools of the third-party client.
.PHONY: setup
setup:
	@.ci/setup

# The test guests: a 512-byte boot sector, and Debian's kernel with a small init. Made anew only when their sources change.
.PHONY: guests
guests: $(GUESTS)/micro.img $(GUESTS)/initrd.img

$(GUESTS)/micro.img: integration-tests/guests/micro/micro.S integration-tests/guests/micro/build
	@integration-tests/guests/micro/build $(GUESTS)

$(GUESTS)/initrd.img: integration-tests/guests/linux/init.c integration-tests/guests/linux/build .ci/setup
	@integration-tests/guests/linux/build $(GUESTS)

# An ordinary Debian with cloud-init, for the tour. Needs root.
$(GUESTS)/debian.qcow2: integration-tests/guests/debian/build
	@integration-tests/guests/debian/build $(GUESTS)

.PHONY: build
build: setup
	$(CARGO) build --workspace

# One command from a clean clone to a cluster that survives the death of a host.
.PHONY: demo
demo: setup
	@$(MAKE) --no-print-directory guests
	$(CARGO) build --workspace
	$(TARGET)/debug/uncloud dev --demo --demo-kernel $(GUESTS)/vmlinuz --demo-initrd $(GUESTS)/initrd.img

# The programs are built together with the tests, so that both share one build of the dependencies. Tests wait for guests and for
# time limits more than they compute, so there are more of them at once than processors.
.PHONY: test
test: export RUST_TEST_THREADS ?= $(shell echo $$((2 * $$(nproc))))
test: setup
	@$(MAKE) --no-print-directory guests
	$(CARGO) build --workspace --all-targets
	$(CARGO) test --workspace

# Needs root, for network namespaces and the guest's file system. CI has built everything for the tests before: the same again.
.PHONY: tour
tour: setup
	@$(MAKE) --no-print-directory guests $(GUESTS)/debian.qcow2
	$(CARGO) build --workspace $(if $(CHECK),--all-targets)
	$(TARGET)/debug/uncloud-tour $(if $(CHECK),--check)

.PHONY: lint
lint: setup
	@.ci/lint

# Only what is measured, in release mode. The tests' package turns on features of tokio and etcd-client that are not shipped, so
# it is built apart.
.PHONY: bench
bench: setup
	@$(MAKE) --no-print-directory guests
	$(CARGO) build --release -p uncloud-controller -p uncloud-agent --bins
	$(CARGO) build --release -p uncloud-integration-tests --bin uncloud-bench
	$(TARGET)/release/uncloud-bench --out target/bench.json

# 10,000 agents that are played and 100,000 VMs: some minutes. Needs no guests.
.PHONY: bench-scale
bench-scale: setup
	$(CARGO) build --release -p uncloud-controller --bins
	$(CARGO) build --release -p uncloud-integration-tests --bin uncloud-bench
	$(TARGET)/release/uncloud-bench --only scale --out target/bench-scale.json

# VMs come and go for CHURN_MINUTES in such a cluster: does memory stay what it is?
CHURN_MINUTES ?= 5
.PHONY: churn
churn: setup
	$(CARGO) build --release -p uncloud-controller --bins
	$(CARGO) build --release -p uncloud-integration-tests --bin uncloud-bench
	CHURN_MINUTES=$(CHURN_MINUTES) $(TARGET)/release/uncloud-bench --only churn --out target/bench-churn.json

# Faults at random for MINUTES, from SEED or the clock. Needs root, for network namespaces.
MINUTES ?= 10
.PHONY: chaos
chaos: setup
	@$(MAKE) --no-print-directory guests
	$(CARGO) build --release -p uncloud-controller -p uncloud-agent --bins
	$(CARGO) build --release -p uncloud-integration-tests --bin uncloud-chaos
	$(TARGET)/release/uncloud-chaos run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# The simulation: many hosts, controllers and faults in one process, from seeds. Ends with an error if any promise is broken.
SEEDS ?= 10000
FROM ?= 1
.PHONY: sim
sim: setup
	$(CARGO) build --workspace --profile sim --bin uncloud-sim
	$(TARGET)/sim/uncloud-sim --seeds $(SEEDS) --from $(FROM)

# Each safety rule is broken in a copy of the sources, and a test must notice.
.PHONY: mutants
mutants: setup
	@integration-tests/mutants/run $(MUTANTS)

.PHONY: clean
clean:
	$(CARGO) clean
	rm -rf target
