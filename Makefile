# Needs go, git and make. Everything else is fetched at pinned versions (tools/), or
# is Redis and a C compiler, which the system's package manager has.

BACKEND      ?= memory
TEST_TIMEOUT ?= 15m
FUZZTIME     ?= 20s
CHAOS        ?= 3
BENCH        ?= .
PKG          ?= ./...

# The module and those nested in it. A user's go.mod sees only the first.
MODULES := . $(patsubst %/go.mod,%,$(wildcard tools/go.mod tools/lint/go.mod bench/go.mod))
# Those with code of this repository, and not just pinned tools.
CODE    := . $(patsubst %/go.mod,%,$(wildcard bench/go.mod))
# Packages that are tested at the same time: each has servers and listeners of its own
# to keep busy, and bounds of time to prove.
PARALLEL := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 2 ? n / 2 : 1)))
# A shell loop that runs its body in every directory of a list, and stops at the
# first that fails.
in = set -e; for dir in $(1); do echo "in $$dir:" >&2; (cd $$dir && $(2)); done

.PHONY: help
help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(filter-out memory,$(BACKEND)) ## Watch a channel at work: BACKEND=memory|redis|nats|etcd
	go run ./internal/demo -backend $(BACKEND)

.PHONY: test
test: redis nats etcd cc ## Run all tests, against real servers, with the race detector
	@$(call in,$(CODE),go vet ./... && go test -race -shuffle=on -p=$(PARALLEL) -timeout=$(TEST_TIMEOUT) $(PKG))

.PHONY: chaos
chaos: redis nats etcd cc ## Put every driver under faults, CHAOS times, and check the record
	go test -race -count=$(CHAOS) -timeout=60m -v \
		-run='Proof|TestConformance/(Cut|Blackhole|Pause|Restart|StateLoss|NoGhostLock|NoLostWakeup)' ./backend/...

.PHONY: bench
bench: redis nats etcd ## Measure: BENCH=regexp
	@$(call in,$(CODE),go test -run='^$$' -bench='$(BENCH)' -benchmem -timeout=60m $(PKG))

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME each
	@set -e; grep -rlE --include='*_test.go' '^func Fuzz' . | while read -r file; do \
		for target in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p' "$$file"); do \
			go test -run='^$$' -fuzz="^$$target\$$" -fuzztime=$(FUZZTIME) "$$(dirname "$$file")"; \
		done; \
	done

.PHONY: lint
lint: .bin/golangci-lint ## Check style, formatting, go.mod files and the other systems' builds
	@$(call in,$(CODE),$(CURDIR)/.bin/golangci-lint run --config=$(CURDIR)/.golangci.yml ./...)
	@$(call in,$(MODULES),go mod tidy -diff)
	@# Files that are built for other systems only; and what users import must build on Windows too.
	GOOS=$$(test "$$(go env GOOS)" = darwin && echo linux || echo darwin) CGO_ENABLED=0 go vet ./...
	GOOS=windows go build $(addsuffix /...,$(wildcard ./backend ./conformance ./dmutex ./cmd)) .

.PHONY: fmt
fmt: .bin/golangci-lint ## Format the code
	@$(call in,$(CODE),$(CURDIR)/.bin/golangci-lint fmt --config=$(CURDIR)/.golangci.yml ./...)

.PHONY: tidy
tidy: ## Tidy all go.mod files
	@$(call in,$(MODULES),go mod tidy)

.PHONY: clean
clean: ## Remove what was built
	rm -rf .bin chaos-out

# The servers, by the names of the backends.

.PHONY: redis nats etcd cc
redis: ## Install Redis, unless it is there or REDIS_SERVER says where
	@internal/testserver/install.sh redis
nats: .bin/nats-server ## Build the NATS server
etcd: .bin/etcd ## Build the etcd server
cc: # the race detector is linked by a C compiler
	@internal/testserver/install.sh cc

# internal/testserver builds the same files in the same places, for a plain `go test`.
.bin/nats-server: tools/go.mod tools/go.sum
	go build -C tools -o ../$@ github.com/nats-io/nats-server/v2
	@touch $@
.bin/etcd: tools/go.mod tools/go.sum
	go build -C tools -o ../$@ go.etcd.io/etcd/server/v3
	@touch $@
.bin/golangci-lint: tools/lint/go.mod tools/lint/go.sum
	go build -C tools/lint -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@
