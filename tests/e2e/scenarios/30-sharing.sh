# shellcheck shell=bash disable=SC2154
# 20 pods of one image: one FUSE mount, 20 bind mounts, and little more memory than for none.
needs_own_cluster
eventually 60 'no mount is left of the scenarios before' no_mounts
memory 'after builds, nothing mounted'
for n in {1..20}; do
  pod "share-$n" "wc -c < /image/srv/large; $stay" image="$volume_image"
  echo ---
done | k apply -f - > /dev/null
since=$(now)
ready share-{1..20}
note "20 pods ready after $(($(now) - since)) ms"
same 'FUSE mounts' 1 "$(shared_mounts)"
same 'bind mounts' 20 "$(bind_mounts)"
for n in 1 20; do same "what share-$n read" 2880000 "$(k logs "share-$n")"; done
memory 'with 20 pods'
gone 120 share-{1..20}
eventually 60 'the mount ends with its last pod' no_mounts
