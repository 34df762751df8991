# shellcheck shell=bash disable=SC2154
# From `kubectl apply` to the first read of an indexed 30,000-file image, beside the same pod without the volume. Nothing shares the
# mount: each time it is made anew. A figure, with a bound that only a hang exceeds.
runs=7
pod index-it 'ls /image/opt/many | wc -l' image="$registry/team/files:30000" | k apply -f - > /dev/null
succeeded index-it 300
same 'directories' 300 "$(k logs index-it)"
gone 60 index-it
measure() { # name with-volume
  local begin name=$1
  begin=$(uptime_now)
  if $2; then
    pod "$name" 'cat /image/opt/many/0123/45.py > /dev/null; cut -d" " -f1 /proc/uptime' image="$registry/team/files:30000"
  else
    pod "$name" 'cat /etc/passwd > /dev/null; cut -d" " -f1 /proc/uptime' | sed -e '/^    volumeMounts/d' -e '/^  volumes:/,$d'
  fi | k apply -f - > /dev/null
  succeeded "$name" 120
  awk -v begin="$begin" -v end="$(k logs "$name")" 'BEGIN {printf "%d\n", (end - begin) * 1000}'
  kw delete pod "$name" --timeout=60s > /dev/null
}
median() { sort -n | sed -n "$(((runs + 1) / 2))p"; }
# Interleaved, so that both meet the same machine.
for n in $(seq $runs); do
  measure "with-$n" true >> "$work/with.ms"
  measure "without-$n" false >> "$work/without.ms"
done
with=$(median < "$work/with.ms") without=$(median < "$work/without.ms")
note "kubectl apply to first read, median of $runs: $with ms with the volume, $without ms without: $((with - without)) ms for it"
note "with: $(tr '\n' ' ' < "$work/with.ms")without: $(tr '\n' ' ' < "$work/without.ms")"
[ $((with - without)) -lt 30000 ] || fail 'more than 30 s'
