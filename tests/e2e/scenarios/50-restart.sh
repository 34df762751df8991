# shellcheck shell=bash disable=SC2154
# The node plugin is killed, and its pod is deleted: what running containers see, word for word; new containers have the volume;
# pods that start meanwhile wait; the kubelet never forgets the driver.
needs_own_cluster
pod before "$stay" image="$volume_image" restart=Always | k apply -f - > /dev/null
pod following "$stay" image="$volume_image" propagation=HostToContainer | k apply -f - > /dev/null
ready before following
read_in() { kw exec "$1" -- cat "/image/$2" 2>&1; }
restarts() { k get pod before -o jsonpath='{.status.containerStatuses[0].restartCount}'; }
contains 'before' "$(read_in before etc/os-release)" 'clip-csi test image'

# Every state of CSINode from here on.
kubectl get csinode "$(k get nodes -o jsonpath='{.items[0].metadata.name}')" --watch -o json > "$work/csinode.json" &
watch=$!
trap 'kill $watch 2> /dev/null || true' EXIT

new_container_reads() { [ "$(restarts)" = "$1" ] && read_in before srv/one-name | grep -qx 'two names'; }
check() { # what restart-count file-that-nobody-has-read
  pod "meanwhile-$2" 'cat /image/etc/os-release' image="$volume_image" | k apply -f - > /dev/null
  succeeded "meanwhile-$2" 120
  if event_contains "meanwhile-$2" 'not found in the list of registered'; then fail "$1: a pod was refused: $(events_of "meanwhile-$2")"; fi
  note "$1: a pod that started meanwhile waited and ran"
  # A path that the kernel has not kept: what it has, it goes on giving.
  # Propagation brings what is mounted below a container's mount, not another mount in its place.
  for one in before following; do
    same "$1: what a running container sees ($one)" "cat: can't open '/image/$3': Transport endpoint is not connected" \
      "$(read_in $one "$3" | grep -v '^command terminated')"
  done
  note "$1: containers that were running see «Transport endpoint is not connected», with HostToContainer as without"
  end_container before
  eventually 120 "$1: a new container of the pod has the volume" new_container_reads "$2"
  note "$1: a new container of the pod has the volume"
}
old=$(plugin_pid node)
kill -KILL "$old"
check 'killed' 1 srv/one-name
[ "$(plugin_pid node)" != "$old" ] || fail 'the plugin was not killed'

old=$(node_pod)
k -n "$namespace" delete pod "$old" --wait=false > /dev/null
check 'deleted' 2 srv/large
[ "$(node_pod)" != "$old" ] || fail 'the pod was not deleted'

kill $watch
states=$(grep -c '"kind": "CSINode"' "$work/csinode.json")
names=$(grep -c '"name": "clip.csi.beam.cloud"' "$work/csinode.json")
same 'CSINode states with the driver, of all' "$states" "$names"
note "CSINode had the driver in all $states states that were seen"
gone 60 before following meanwhile-1 meanwhile-2
eventually 60 'no mount is left' no_mounts
