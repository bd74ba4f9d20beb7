# `make` lists the targets. Steps run one after the other whatever -j says: they share the CPU and
# cargo's lock, and the test runner's summary has to come last.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Where rustup puts cargo, in case this shell does not know yet.
export PATH := $(PATH):$(HOME)/.cargo/bin
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: setup
setup: ## install what building and testing need (Debian packages, cargo-nextest)
	@scripts/setup.sh build test

.PHONY: setup-build
setup-build:
	@scripts/setup.sh build

.PHONY: setup-xen
setup-xen:
	@scripts/setup.sh xen

.PHONY: build-xen
build-xen: setup-build setup-xen ## the same with Xen's libraries, for hosts that run Xen
	cargo build --release --locked --package hybridmig --features xen

.PHONY: build
build: setup-build ## build the release binary, target/release/hybridmig
	cargo build --release --locked --package hybridmig

.PHONY: demo
demo: build ## move a self-checking guest over an emulated 50 ms link on this machine
	$(TARGET_DIR)/release/hybridmig demo

.PHONY: test
test: setup setup-xen fmt clippy test-doc test-xen test-run ## check formatting and lints, run every test

.PHONY: fmt
fmt:
	cargo fmt --all --check

.PHONY: clippy
clippy:
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked --workspace --all-targets --features xen -- -D warnings

.PHONY: test-doc
test-doc:
	cargo test --locked --workspace --doc --quiet

# What is built with the feature only; links Xen's libraries, and needs no Xen.
.PHONY: test-xen
test-xen:
	cargo nextest run --locked --package hybridmig-pager --package hybridmig-engine --features hybridmig-engine/xen --lib xen

.PHONY: test-run
test-run:
	cargo nextest run --locked --workspace

.PHONY: stress
stress: setup ## the same tests while the cores are taken away for moments, as shared hosts do: 25 minutes, as root
	cargo nextest run --locked --workspace --no-run
	scripts/steal.py cargo nextest run --locked --workspace

.PHONY: bench
bench: setup bench-build ## move guests with hybridmig and QEMU over long links, as root: 20 minutes
	$(TARGET_DIR)/release/bench run bench --fresh
	$(TARGET_DIR)/release/bench report $(TARGET_DIR)/bench/bench.jsonl \
		--made-by 'make bench' --out docs/bench/migrations

.PHONY: bench-full
bench-full: setup bench-build ## the same over a grid of 252 cells, three times: a week
	$(TARGET_DIR)/release/bench run full
	$(TARGET_DIR)/release/bench report $(TARGET_DIR)/bench/full.jsonl \
		--made-by 'make bench-full' --out docs/bench/migrations-full

.PHONY: bench-storage
bench-storage: setup bench-build ## move a guest with a disk of 2 GiB, beside a mirror over NBD, as root: 45 minutes
	$(TARGET_DIR)/release/bench run storage --fresh
	$(TARGET_DIR)/release/bench report $(TARGET_DIR)/bench/storage.jsonl \
		--made-by 'make bench-storage' --out docs/bench/storage

.PHONY: bench-plan
bench-plan: setup bench-build ## judge the planner against fixed shares and pure modes, 15 cells, as root: 80 minutes
	$(TARGET_DIR)/release/bench grid default --fresh
	$(TARGET_DIR)/release/bench grid default --report docs/bench/plan

.PHONY: bench-programs
bench-programs: setup bench-build ## move guests with redis, sqlite and a compiler, beside QEMU, as root: 45 minutes
	$(TARGET_DIR)/release/bench run programs --fresh
	$(TARGET_DIR)/release/bench report $(TARGET_DIR)/bench/programs.jsonl \
		--made-by 'make bench-programs' --out docs/bench/programs
	$(TARGET_DIR)/release/bench run programs-disk --fresh
	$(TARGET_DIR)/release/bench report $(TARGET_DIR)/bench/programs-disk.jsonl \
		--made-by 'make bench-programs' --out docs/bench/programs-disk

.PHONY: bench-programs-shares
bench-programs-shares: setup bench-build ## the same programs with fixed shares and in the pure modes, as root: 45 minutes
	$(TARGET_DIR)/release/bench run programs-shares --fresh
	$(TARGET_DIR)/release/bench report $(TARGET_DIR)/bench/programs-shares.jsonl \
		--made-by 'make bench-programs-shares' --out docs/bench/programs-shares

.PHONY: bench-virtual
bench-virtual: setup bench-build ## the same under a virtual clock, 36 plans a cell: 5 minutes
	$(TARGET_DIR)/release/bench virtual default --out $(TARGET_DIR)/bench/virtual.jsonl

.PHONY: bench-transport
bench-transport: setup bench-build ## measure what transports make of long links, as root: an hour
	rm -f $(TARGET_DIR)/bench/transport.jsonl
	$(TARGET_DIR)/release/bench goodput --out $(TARGET_DIR)/bench/transport.jsonl
	$(TARGET_DIR)/release/bench goodput --faults --out $(TARGET_DIR)/bench/transport.jsonl \
		--table docs/bench/transport.md

.PHONY: bench-build
bench-build: build
	cargo build --release --locked --package hybridmig-bench --bin bench

.PHONY: bench-micro
bench-micro: setup ## measure what the pieces cost, as root: 4 minutes on an idle machine
	cargo bench --locked --package hybridmig-bench --benches

XEN_LAB = HYBRIDMIG=$(TARGET_DIR)/release/hybridmig tests/xen-lab/lab.sh $(TARGET_DIR)/xen-lab

.PHONY: xen-lab
xen-lab: build-xen ## move a domain between two real Xen hosts under TCG, as root: 15 minutes the first time, then 8 to 11
	@scripts/setup.sh xen-lab
	$(XEN_LAB)

.PHONY: xen-lab-more
xen-lab-more: build-xen ## the same with HVM, devices, a balloon, 2 vCPUs, and killed senders: 15 minutes
	@scripts/setup.sh xen-lab
	$(XEN_LAB) more

.PHONY: deny
deny: setup-build ## check licenses, bans and sources of the dependencies (cargo-deny)
	@cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny --locked check bans licenses sources

.PHONY: image
image: ## build the Linux guest of the tests, target/guest-image
	scripts/guest-image.sh $(TARGET_DIR)/guest-image

.PHONY: clean
clean: ## remove everything that was built
	cargo clean
