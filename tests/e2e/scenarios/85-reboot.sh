# shellcheck shell=bash disable=SC2154
# A power cut: every process, mount and tmpfs of the node goes at once, its disk stays. Afterwards the pods read again.
needs_own_cluster
for n in 1 2; do pod "survivor-$n" "wc -c < /image/srv/large; $stay" image="$volume_image" restart=Always; echo ---; done | k apply -f - > /dev/null
ready survivor-1 survivor-2
"$e2e/../kube/down" --keep
[ -n "$(find "$KUBE_STATE/node" -name 'clip.csi.beam.cloud-reg.sock')" ] || fail 'nothing was left to start from'
"$e2e/../kube/up" > /dev/null
restarted() { [ "$(k get pod "$1" -o jsonpath='{.status.containerStatuses[0].restartCount}')" -ge 1 ] && k logs "$1" | grep -qx 2880000; }
since=$(now)
for n in 1 2; do eventually 240 "survivor-$n reads again" restarted survivor-$n; done
note "both pods read again $(($(now) - since)) ms after the node was Ready"
eventually 60 'the driver is registered' registered
same 'FUSE mounts' 1 "$(shared_mounts)"
same 'bind mounts' 2 "$(bind_mounts)"
gone 60 survivor-1 survivor-2
eventually 60 'no mount is left' no_mounts
