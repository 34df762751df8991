# shellcheck shell=bash disable=SC2154
# What chart and manifests render passes the API server's own validation, for several sets of values.
cd "$e2e/../.." || exit
accepted() { # what
  kubectl apply --server-side --dry-run=server --force-conflicts -f - > "$work/dry-run.log" 2>&1 || { cat "$work/dry-run.log"; fail "$1"; }
  grep -qi 'warning' "$work/dry-run.log" && { grep -i warning "$work/dry-run.log"; fail "$1: warnings"; }
  note "$1: $(wc -l < "$work/dry-run.log") objects accepted"
}
template() { helm template other charts/clip-csi --namespace "$namespace" --set driverName=other.example.com "$@"; }
# Every value of the chart is in one of these. What only the Prometheus operator's API knows is left out.
for file in $(tests/install/render "$work/rendered" --set driverName=other.example.com); do
  accepted "values/$(basename "$file")" < "$file"
done
template --set controller.enabled=true --set config.imageService.archiveStore=s3://b/p --set startupTaint.enabled=true \
  --set metrics.dashboard.enabled=true --set 'controller.secretNamespaces={default,kube-system}' | accepted 'controller, startup taint, dashboard'
template --values "$work/values.yaml" | accepted "this site's values"
for base in manifests/base manifests/provisioning; do
  kubectl kustomize "$base" | accepted "kustomize $base"
done
