# shellcheck shell=bash disable=SC2154
# What chart and manifests render passes the API server's own validation, for several sets of values.
cd "$e2e/../.." || exit
accepted() { # what
  kubectl apply --server-side --dry-run=server --force-conflicts -f - > "$work/dry-run.log" 2>&1 || { cat "$work/dry-run.log"; fail "$1"; }
  grep -qi 'warning' "$work/dry-run.log" && { grep -i warning "$work/dry-run.log"; fail "$1: warnings"; }
  note "$1: $(wc -l < "$work/dry-run.log") objects accepted"
}
template() { helm template other charts/clip-csi --namespace "$namespace" --set driverName=other.example.com "$@"; }
template | accepted 'default values'
template --set controller.enabled=true --set config.imageService.archiveStore=s3://b/p --set startupTaint.enabled=true \
  --set metrics.dashboard.enabled=true --set 'controller.secretNamespaces={default,kube-system}' | accepted 'controller, startup taint, dashboard'
template --set node.hostNetwork=true --set node.updateStrategy.type=OnDelete --set node.cache.hostPath=/mnt/fast --set node.cache.size=1Ti \
  --set 'image.digest=sha256:0000000000000000000000000000000000000000000000000000000000000000' | accepted 'host network, OnDelete, cache elsewhere'
template --set-json 'storageClasses=[{"name":"one","parameters":{"image":"docker.io/library/python:3.12-slim"},"reclaimPolicy":"Retain"}]' | accepted 'storage classes'
template --values "$work/values.yaml" | accepted "this site's values"
for base in manifests/base manifests/kustomize manifests; do
  [ -e "$base/kustomization.yaml" ] || continue
  kubectl kustomize "$base" | accepted "kustomize $base"
done
