# shellcheck shell=bash disable=SC2154
# helm upgrade keeps pods' volumes; helm uninstall leaves no mount, no taint, no finalizer, no registration.
pod upgraded "$stay" image="$volume_image" restart=Always | k apply -f - > /dev/null
ready upgraded
old=$(node_pod)
helm upgrade clip-csi "$e2e/../../charts/clip-csi" --namespace "$namespace" --values "$work/values.yaml" --set config.telemetry.logLevel=debug > /dev/null
driver_ready
replaced() { [ "$(node_pod)" != "$old" ]; }
eventually 120 'other configuration, other pods' replaced
end_container upgraded
reads() { kw exec upgraded -- cat /image/srv/one-name | grep -qx 'two names'; }
eventually 120 'after the upgrade a new container has the volume' reads
gone 60 upgraded
$own_cluster && eventually 60 'no mount is left' no_mounts

helm uninstall clip-csi --namespace "$namespace" --wait --timeout 120s > /dev/null
node=$(k get nodes -o jsonpath='{.items[0].metadata.name}')
no_pods() { [ -z "$(k -n "$namespace" get pods -o name)" ]; }
eventually 120 'the pods of the driver are gone' no_pods
unregistered() { ! registered; }
eventually 60 'CSINode no longer lists the driver' unregistered
same 'taints' '' "$(k get node "$node" -o jsonpath='{.spec.taints[*].key}')"
left=$(k get csidriver,clusterrole,clusterrolebinding,storageclass,pv -o name | grep -i clip || true)
same 'objects that are left' '' "$left"
kw delete namespace "$namespace" --timeout=120s > /dev/null || fail 'the namespace does not go: a finalizer'
if $own_cluster; then
  same 'mounts that are left' '' "$(our_mounts)"
  same 'links in plugins_registry' '' "$(in_node sh -c 'ls /var/lib/kubelet/plugins_registry')"
fi
