# shellcheck shell=bash disable=SC2034,SC2154,SC2016 # for scenarios; from run; for other shells
# What scenarios are written with. Sourced by run, in a process of its own per scenario, with `set -euo pipefail`.
#
# From run: own_cluster (true: tests/kube's, whose inside can be looked at), work (a directory), image (what volumes show),
# registry, private_registry, s3 (host:port), s3_query (of s3:// places), chart_values (files for helm), e2e (tests/e2e).

driver=clip.csi.beam.cloud
namespace=clip-csi # of the driver
volume_image=docker.io/library/python:3.12-slim
pod_image=docker.io/library/busybox:1.37

k() { kubectl --request-timeout=60s "$@"; }
# Commands that wait bring their own limit.
kw() { kubectl "$@"; }

note() { printf '    %s\n' "$*"; }
fail() { printf '    FAILED: %s\n' "$*"; exit 1; }
# A scenario, or a part of it, that this cluster or checkout can't run.
skip() { printf '    SKIPPED: %s\n' "$*"; exit 77; }
needs_own_cluster() { $own_cluster || skip "it looks into the node; it needs tests/kube's cluster"; }

# Milliseconds since the epoch.
now() { echo $((${EPOCHREALTIME/./} / 1000)); }

# Tries until the command succeeds; at most so many seconds.
eventually() { # seconds what command...
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" > "$work/eventually.log" 2>&1; do
    if [ $SECONDS -ge $deadline ]; then
      sed 's/^/      /' "$work/eventually.log"
      fail "not within the time: $what"
    fi
    sleep 0.5
  done
}

# What is expected word for word.
same() { # what expected found
  [ "$2" = "$3" ] || fail "$1: expected «$2», found «$3»"
}
contains() { # what text part
  case $2 in *"$3"*) ;; *) fail "$1: «$3» is not in «$2»" ;; esac
}

# A pod with one inline volume at /image. Attributes are name=value; of the pod itself: secret=NAME (nodePublishSecretRef),
# restart=POLICY, propagation=KIND.
pod() { # name shell-command attribute...
  local name=$1 command=$2 attributes='' secret='' restart=Never propagation=None pair
  shift 2
  for pair in "$@"; do
    case $pair in
      secret=*) secret="nodePublishSecretRef: {name: ${pair#*=}}" ;;
      restart=*) restart=${pair#*=} ;;
      propagation=*) propagation=${pair#*=} ;;
      *) attributes+="        ${pair%%=*}: \"${pair#*=}\""$'\n' ;;
    esac
  done
  cat <<EOC
apiVersion: v1
kind: Pod
metadata: {name: $name, labels: {app: $name}}
spec:
  restartPolicy: $restart
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: $pod_image
    imagePullPolicy: IfNotPresent
    command: [sh, -c, '$command']
    volumeMounts: [{name: image, mountPath: /image, mountPropagation: $propagation}]
  volumes:
  - name: image
    csi:
      driver: $driver
      readOnly: true
      $secret
      volumeAttributes:
$attributes
EOC
}
# As long as the pod shall live. Ends at SIGTERM at once.
stay='trap exit TERM; while :; do sleep 0.2; done'

succeeded() { # pod seconds
  # A failure shall not be waited out.
  local deadline=$((SECONDS + $2)) phase=
  while [ $SECONDS -lt $deadline ]; do
    phase=$(k get pod "$1" -o jsonpath='{.status.phase}')
    case $phase in
      Succeeded) return 0 ;;
      Failed) k logs "$1" | tail -n 20 | sed 's/^/      /'; fail "pod $1 has failed" ;;
    esac
    sleep 0.3
  done
  k describe pod "$1" | tail -n 15 | sed 's/^/      /'
  fail "pod $1 is $phase after $2 s"
}
ready() { # pod... : waits
  kw wait --for=condition=Ready --timeout=180s "${@/#/pod/}" > /dev/null || {
    k describe pod "$@" | grep -A 12 '^Events' | sed 's/^/      /'
    fail "not ready: $*"
  }
}
# Ends a pod's container, and with it, at times, the command that asks for it.
end_container() { kw exec "$1" -- kill -TERM 1 > /dev/null 2>&1 || true; }
events_of() { k get events --field-selector "involvedObject.name=$1" -o jsonpath='{range .items[*]}{.message}{"\n"}{end}'; }
event_contains() { events_of "$1" | grep -qF -- "$2"; }

# Deletes pods and says how long it took.
gone() { # limit-seconds pod...
  local since limit=$1
  shift
  since=$(now)
  kw delete pod "$@" --timeout="${limit}s" > /dev/null || fail "pods are not gone within $limit s: $*"
  note "deleted $* in $(($(now) - since)) ms"
}

node_pod() { k -n $namespace get pod -l app.kubernetes.io/component=node -o jsonpath='{.items[0].metadata.name}'; }
driver_ready() {
  kw -n $namespace rollout status daemonset -l app.kubernetes.io/component=node --timeout=180s > /dev/null &&
    kw -n $namespace rollout status deployment -l app.kubernetes.io/component=controller --timeout=180s > /dev/null
}
registered() { k get csinode -o jsonpath='{.items[*].spec.drivers[*].name}' | grep -qw "$driver"; }

# --- the node's inside, of tests/kube's cluster only
in_node() { nsenter -t "$(cat "$KUBE_STATE/init.pid")" -m -n -p -u -i -- "$@"; }
# Where the node has our mounts. Those that a plugin on this machine had when the node came up are in its table too.
our_mounts() { awk '/ clip-csi:/ && $5 ~ "^/var/lib/kubelet/" {print $5}' "/proc/$(cat "$KUBE_STATE/init.pid")/mountinfo"; }
shared_mounts() { our_mounts | grep -c "/plugins/$driver/mounts/" || true; }
bind_mounts() { our_mounts | grep -c '/pods/' || true; }
no_mounts() { [ -z "$(our_mounts)" ]; }
# Pid, in the machine's view, of the process `clip-csi node` or `clip-csi controller`.
plugin_pid() { # node | controller
  local pid
  for pid in /proc/[0-9]*; do
    [ -r "$pid/cmdline" ] || continue
    [ "$(tr '\0' ' ' 2> /dev/null < "$pid/cmdline" | cut -d' ' -f1,2 | sed 's,.*/,,')" = "clip-csi $1" ] || continue
    # Another cluster may be up, and this machine may run a plugin of its own.
    if grep -q "/$NODE/" "$pid/cgroup"; then basename "$pid"; fi
  done
  return 0
}
rss() { awk '/^(VmRSS|RssAnon)/ {kib[$1] = $2} END {printf "%d MB (%d anonymous)", kib["VmRSS:"] / 976.6, kib["RssAnon:"] / 976.6}' "/proc/$1/status"; } # pid
memory() { note "resident memory $1: node plugin $(rss "$(plugin_pid node)"), controller $(rss "$(plugin_pid controller)")"; } # when

# Seconds since the machine's start, the same in pods.
uptime_now() { cut -d' ' -f1 /proc/uptime; }

# --- what a volume shows, as text: one line per path (owner, mode, size, time, target, SHA-256), sorted. Runs on this machine
# and in pods alike, with busybox; directories have neither size nor time, since unpackers touch them.
listing='export LC_ALL=C; cd "$0" && {
  find . -type d -exec stat -c "%n %a %u %g dir" {} +
  find . -type f -exec stat -c "%n %a %u %g %s %Y file" {} +
  find . -type l -exec stat -c "%N %u %g %Y link" {} +
  find . ! -type d ! -type f ! -type l -exec stat -c "%n %a %u %g %t:%T special" {} +
  find . -type f -exec sha256sum {} +
} | sort'
# The same of a directory of this machine.
list_here() { # directory
  local tool
  mkdir -p "$work/busybox"
  for tool in sh find stat sort sha256sum; do ln -sf "$(command -v busybox)" "$work/busybox/$tool"; done
  PATH=$work/busybox sh -c "$listing" "$1"
}
