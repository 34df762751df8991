# shellcheck shell=bash disable=SC2034 # its variables are for those who source it
# Names and places that build, up, down and node agree on. Sourced, with `set -u`.
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

# Built parts, kept between runs and shared by all checkouts.
KUBE_CACHE=${CLIP_CSI_BUILD_DIR:-$HOME/.cache/clip-csi}/kube

# Several clusters may be up at once: instance N has its own node name, addresses, cgroup and state.
KUBE_INSTANCE=${CLIP_CSI_KUBE_INSTANCE:-0}
NODE=kn$KUBE_INSTANCE
NODE_IP=10.89.$KUBE_INSTANCE.1
HOST_IP=10.89.$KUBE_INSTANCE.254
SVC_CIDR=10.96.0.0/16
API_IP=10.96.0.1
DNS_IP=10.96.0.10
POD_CIDR=10.244.0.0/24
# All of the cluster's state. Short: paths of sockets hold 107 bytes.
KUBE_STATE=${CLIP_CSI_KUBE_STATE:-$KUBE_CACHE/run$KUBE_INSTANCE}
KUBECONFIG_FILE=$KUBE_STATE/kubeconfig
# Directories with fixed places that are this node's own, bound to its state.
NODE_DIRS=(/var/lib/kubelet /var/lib/cni /var/lib/clip-csi /var/log/pods /var/log/containers)
# Settings of the whole machine that a kubelet changes.
SYSCTLS=(vm/overcommit_memory kernel/panic kernel/panic_on_oops)

# Other instances that are up: their state directories.
others_up() {
  local pid
  for pid in "$KUBE_CACHE"/run*/init.pid; do
    [ -e "$pid" ] && [ "$(dirname "$pid")" != "$KUBE_STATE" ] && dirname "$pid"
  done
  return 0
}

say() { printf 'kube: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# A command in the node's namespaces.
in_node() { nsenter -t "$(cat "$KUBE_STATE/init.pid")" -m -n -p -u -i -- "$@"; }
