# shellcheck shell=bash disable=SC2154,SC2034
# From nothing to a driver that the kubelet knows: what README.md says, with this site's values.
k create namespace $namespace > /dev/null
k -n $namespace create secret generic clip-csi-s3 --from-literal=AWS_ACCESS_KEY_ID=test-id --from-literal=AWS_SECRET_ACCESS_KEY=test-key > /dev/null
node=$(k get nodes -o jsonpath='{.items[0].metadata.name}')
# An admin who lets nodes join with it.
k taint node "$node" clip.csi.beam.cloud/not-ready=:NoSchedule > /dev/null
since=$(now)
helm install clip-csi "$e2e/../../charts/clip-csi" --namespace $namespace --values "$work/values.yaml" \
  --set startupTaint.enabled=true --wait --timeout 300s > "$work/helm.log" || { cat "$work/helm.log"; fail 'helm install'; }
note "helm install --wait: $(($(now) - since)) ms"
grep -q . "$work/helm.log" || fail 'NOTES are empty'
eventually 60 'CSINode lists the driver' registered
no_taint() { ! k get node "$node" -o jsonpath='{.spec.taints[*].key}' | grep -q clip.csi; }
eventually 60 'the startup taint is removed' no_taint
driver_ready
pod first 'cat /image/etc/os-release' image=$volume_image | k apply -f - > /dev/null
succeeded first 120
contains 'what the pod read' "$(k logs first)" 'clip-csi test image'
gone 60 first
