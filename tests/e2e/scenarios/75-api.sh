# shellcheck shell=bash disable=SC2154
# The tests of the Kubernetes client (tests/k8s.rs) against this API server.
cd "$e2e/../.." || exit
[ -e tests/k8s.rs ] || [ -e tests/k8s ] || skip 'there is no tests/k8s'
[ -z "${CLIP_CSI_E2E_NO_CARGO:-}" ] || skip 'CLIP_CSI_E2E_NO_CARGO is set'
CLIP_CSI_TEST_KUBECONFIG=$KUBECONFIG cargo test --locked --quiet --test k8s
