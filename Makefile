# `make help` lists the targets. Nothing is built inside of the checkout: see CLIP_CSI_BUILD_DIR in .ci/setup.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo build image test sanity e2e soak interop interop-all charts manifests bench bench-sweep lint fmt fuzz

# What is missing is installed, and said; with everything there it takes a moment.
build-env = environment=$$(.ci/setup build); eval "$$environment"
test-env = environment=$$(.ci/setup test); eval "$$environment"

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: ## build (release) and show it all on this machine: no cluster, server or configuration
	@$(build-env); binary=$$(.ci/release); "$$binary" demo

build: ## build the release binary (static); says where it is
	@$(build-env); .ci/release

image: ## make the container image as an OCI archive (IMAGE=name:tag OUT=file.tar); no Docker is needed
	@$(build-env); .ci/image "$(IMAGE)" "$(OUT)"

test: ## all tests; installs what they need (as root, with apt), lists what was skipped
	@$(test-env); .ci/with-helm .ci/test

sanity: ## csi-sanity against node plugin and controller (root); skips are those of docs/csi-sanity.md
	@environment=$$(.ci/setup kube); eval "$$environment"; tests/sanity/run

e2e: ## a real Kubernetes, with kubectl: tests/e2e (root, or KUBECONFIG); SCENARIOS="NAME ..." for some
	@environment=$$(.ci/setup kube); eval "$$environment"; tests/e2e/run $(SCENARIOS)

soak: ## the property tests with other inputs each time, many of them (PROPTEST_CASES, default 20000)
	@$(test-env); PROPTEST_RNG_SEED=$$(date +%s%N | cut -c8-) PROPTEST_CASES=$${PROPTEST_CASES:-20000} cargo test --locked --lib

interop: ## only the tests against the Go module: our archives read by it, its by us
	@$(test-env); .ci/test --test interop

interop-all: ## the same with images as people have them, in every form, both ways (root; network once, 12 GB of disk, up to an hour); IMAGES="NAME ..." for some
	@environment=$$(.ci/setup images); eval "$$environment"; images=$$(tests/images/build $(IMAGES)); binary=$$(.ci/release); \
	CLIP_CSI_IMAGES="$$images" CLIP_CSI_TEST_BINARY="$$binary" .ci/test --test interop_all -- --nocapture --test-threads 1 $(IMAGES)

charts: ## only the tests of chart, manifests and their documentation
	@$(test-env); .ci/with-helm .ci/test --test install

manifests: ## write manifests/ and docs/helm-values.md anew from the chart
	@$(test-env); CLIP_UPDATE=1 .ci/with-helm cargo test --locked --test install

bench: ## the benchmarks
	@$(test-env); cargo bench --locked --bench inflate --bench cache --bench mounted

bench-sweep: ## which span size? a numpy image over a shaped link (takes minutes, packages from Debian and PyPI)
	@$(test-env); cargo bench --locked --bench sweep

lint: ## format, clippy, licences
	@$(build-env); cargo fmt --all --check; cargo clippy --all-targets --locked -- -D warnings; \
	PATH="$$(.ci/tool cargo-deny 0.20.2):$$PATH" cargo deny --all-features check --hide-inclusion-graph bans licenses sources

fmt: ## format the code
	@$(build-env); cargo fmt --all

fuzz: ## fuzz TARGET (make fuzz TARGET=gob) for SECONDS, or until stopped: docs/fuzzing.md
	@$(build-env); CORPUS="$${CORPUS:-$$CLIP_CSI_BUILD_DIR/fuzz}" .ci/fuzz $(or $(SECONDS),0) $(TARGET)
