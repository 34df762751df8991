# shellcheck shell=bash disable=SC2154
# What a user reads in `kubectl describe pod` when a volume can't be had; and such a pod can be deleted at once.
# Name, and what the message has to say. The pod must be gone within 30 s, whatever the driver is waiting for.
says() { # pod part...
  local pod=$1 part
  shift
  for part in "$@"; do
    eventually 120 "kubectl describe pod $pod says «$part»; it says: $(events_of "$pod" | tail -n 3)" event_contains "$pod" "$part"
  done
  note "$pod: $(events_of "$pod" | grep -F -- "$1" | tail -n 1 | sed 's/.*rpc error: //')"
  gone 30 "$pod"
}
refused() { # name attribute...
  pod "$1" 'exit 1' "${@:2}" | k apply -f - > /dev/null
}
k create secret docker-registry wrong --docker-server="$private_registry" --docker-username=reader --docker-password=not-it > /dev/null
k create secret docker-registry right --docker-server="$private_registry" --docker-username=reader --docker-password=secret-pw > /dev/null
refused wrong-image image="$registry/library/nothing:1"
refused wrong-tag image="$registry/library/python:never"
refused denied image="$private_registry/team/secret:1"
refused wrong-password image="$private_registry/team/secret:1" secret=wrong
refused unreachable image="$host_closed/team/app:1"
refused misspelt imgae="$volume_image"
says wrong-image "$registry/library/nothing:1" 'not found'
says wrong-tag "$registry/library/python:never" 'not found'
says denied "$private_registry" 'add a pull secret'
says wrong-password "$private_registry"
says unreachable "$host_closed"
says misspelt 'did you mean image?'
pod allowed 'cat /image/etc/os-release' image="$private_registry/team/secret:1" secret=right | k apply -f - > /dev/null
succeeded allowed 120
if k get events -o json | grep -q 'secret-pw\|not-it'; then fail 'a password is in an event'; fi
if k -n "$namespace" logs "$(node_pod)" | grep -q 'secret-pw\|not-it'; then fail 'a password is in the log'; fi
gone 30 allowed
k delete secret wrong right > /dev/null
