# shellcheck shell=bash disable=SC2154
# Each example runs to completion as it stands but for places and keys, and what its volume shows is the image, file by file.
examples=$e2e/../../manifests/examples
list_here "$work/oracle/rootfs" > "$work/oracle.txt"
lines=$(wc -l < "$work/oracle.txt")
[ "$lines" -gt 1000 ] || fail "the oracle has $lines lines"
note "$lines lines to compare: owner, mode, size, time, target and SHA-256 of every path, by umoci"

# The archives of 02 and 03, as the comments there say.
export AWS_ACCESS_KEY_ID=test-id AWS_SECRET_ACCESS_KEY=test-key
"$clip" archive --plain-http "$registry" "$registry/library/python:3.12-slim" -o "$work/v1.clip" 2> "$work/archive.log" || { cat "$work/archive.log"; fail archive; }
"$clip" index --plain-http "$registry" "$registry/library/python:3.12-slim" -o "$work/v2.clip" 2> "$work/index.log" || { cat "$work/index.log"; fail index; }
for v in v1 v2; do
  "$clip" push "$work/$v.clip" "s3://example-bucket/images/python-$v.clip$s3_query" 2> "$work/push.log" || { cat "$work/push.log"; fail push; }
done

render() { "$examples/render" --s3 "s3://example-bucket/$s3_query" --s3-key test-id:test-key "$1"; }
compare() { # what file
  diff "$work/oracle.txt" "$2" > "$work/diff" || { head -n 20 "$work/diff"; fail "$1: not what the image has"; }
}
for file in "$examples"/0*.yaml; do
  name=$(basename "$file" .yaml)
  render "$file" | k apply -f - > /dev/null
  case $name in
    *-job) pod=job/clip-python; kw wait --for=condition=Complete --timeout=180s $pod > /dev/null || fail "$name" ;;
    *-deployment) pod=deployment/clip-shared; kw rollout status $pod --timeout=180s > /dev/null || fail "$name" ;;
    *)
      pod=$(render "$file" | awk '/^kind: Pod$/ {p = 1} p && /^  name:/ {print $2; exit}')
      succeeded "$pod" 180
      pod=pod/$pod
      ;;
  esac
  log=$(k logs "$pod")
  case $name in
    *-job) contains "$name" "$log" '"python": "3.' ;;
    *) contains "$name" "$log" 'clip-csi test image' ;;
  esac
  # Once more, with a container that lists everything.
  if [ "$pod" = deployment/clip-shared ]; then
    kw exec "$pod" -- sh -c "$listing" /image > "$work/listing.txt"
  else
    kw delete "$pod" --timeout=60s > /dev/null
    render "$file" | k create --dry-run=client -o json -f - | "$e2e/listing.py" "$listing" | k apply -f - > /dev/null
    case $pod in
      job/*) kw wait --for=condition=Complete --timeout=300s "$pod" > /dev/null || fail "$name, listing" ;;
      *) succeeded "${pod#pod/}" 300 ;;
    esac
    k logs "$pod" > "$work/listing.txt"
  fi
  compare "$name" "$work/listing.txt"
  note "$name: ran, and is the image"
  render "$file" | kw delete --timeout=120s -f - > /dev/null
done
