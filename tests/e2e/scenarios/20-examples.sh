# shellcheck shell=bash disable=SC2154,SC2034
# Each example runs to completion as it stands but for places and keys, and what its volume shows is the image, file by file.
examples=$e2e/../../manifests/examples
sh -c "$listing" "$work/oracle/rootfs" > "$work/oracle.txt"
[ "$(wc -l < "$work/oracle.txt")" -gt 1000 ] || fail 'the oracle has no files'

# The archives of 02 and 03, as their comments say.
clip=${CLIP_CSI_BINARY:-$("$e2e/../../.ci/release")}
for v in archive:v1 index:v2; do
  "$clip" "${v%:*}" "oci:$work/layout:python" -o "$work/python-${v#*:}.clip" 2> /dev/null
done
