# shellcheck shell=bash disable=SC2154
# From nothing to a driver that the kubelet knows: what README.md says, with this site's values.
k create namespace "$namespace" > /dev/null
k -n "$namespace" create secret generic clip-csi-s3 \
  --from-literal=AWS_ACCESS_KEY_ID=test-id --from-literal=AWS_SECRET_ACCESS_KEY=test-key > /dev/null
node=$(k get nodes -o jsonpath='{.items[0].metadata.name}')
# An admin whose nodes join with it.
k taint node "$node" clip.csi.beam.cloud/not-ready=:NoSchedule > /dev/null
since=$(now)
helm install clip-csi "$e2e/../../charts/clip-csi" --namespace "$namespace" --values "$work/values.yaml" > "$work/helm.log" 2>&1 ||
  { cat "$work/helm.log"; fail 'helm install'; }
contains 'NOTES' "$(cat "$work/helm.log")" 'kubectl'
eventually 120 'CSINode lists the driver' registered
note "helm install until CSINode lists the driver: $(($(now) - since)) ms"
no_taint() { ! k get node "$node" -o jsonpath='{.spec.taints[*].key}' | grep -q clip.csi; }
taints=$(k get node "$node" -o jsonpath='{.spec.taints[*].key}')
if $taint_removal; then
  eventually 120 'the startup taint is removed' no_taint
else
  contains 'taints' "$taints" clip.csi.beam.cloud/not-ready
  k taint node "$node" clip.csi.beam.cloud/not-ready- > /dev/null
  note 'SKIPPED: the startup taint is not removed by this version of the driver; it was taken away here'
fi
driver_ready
pod first 'cat /image/etc/os-release' image="$volume_image" | k apply -f - > /dev/null
succeeded first 120
contains 'what the pod read' "$(k logs first)" 'clip-csi test image'
gone 60 first
