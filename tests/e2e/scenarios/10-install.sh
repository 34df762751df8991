# shellcheck shell=bash disable=SC2154
# From nothing to a driver that the kubelet knows: what README.md says, with this site's values.
k create namespace "$namespace" > /dev/null
k -n "$namespace" create secret generic clip-csi-s3 \
  --from-literal=AWS_ACCESS_KEY_ID=test-id --from-literal=AWS_SECRET_ACCESS_KEY=test-key > /dev/null
node=$(k get nodes -o jsonpath='{.items[0].metadata.name}')
# An admin whose nodes join with the driver's taint, and with one that is none of its business.
k taint node "$node" clip.csi.beam.cloud/agent-not-ready=:NoSchedule example.com/other=:PreferNoSchedule > /dev/null
since=$(now)
helm install clip-csi "$e2e/../../charts/clip-csi" --namespace "$namespace" --values "$work/values.yaml" > "$work/helm.log" 2>&1 ||
  { cat "$work/helm.log"; fail 'helm install'; }
contains 'NOTES' "$(cat "$work/helm.log")" 'kubectl'
eventually 120 'CSINode lists the driver' registered
note "helm install until CSINode lists the driver: $(($(now) - since)) ms"
taints() { k get node "$node" -o jsonpath='{.spec.taints[*].key}'; }
only_the_other() { [ "$(taints)" = example.com/other ]; }
eventually 120 'the startup taint is removed, and no other' only_the_other
k taint node "$node" example.com/other- > /dev/null
driver_ready
if $own_cluster; then memory 'at rest'; fi
pod first 'cat /image/etc/os-release' image="$volume_image" | k apply -f - > /dev/null
succeeded first 120
contains 'what the pod read' "$(k logs first)" 'clip-csi test image'
gone 60 first
