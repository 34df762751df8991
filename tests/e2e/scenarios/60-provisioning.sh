# shellcheck shell=bash disable=SC2154
# A StorageClass and claims: provisioned once, read, deleted, and a controller that is killed in between.
claim() { # name class
  printf 'apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: %s}\nspec: {storageClassName: %s, accessModes: [ReadOnlyMany], resources: {requests: {storage: 1Gi}}}\n---\n' "$1" "$2"
}
class() { # name image
  printf 'apiVersion: storage.k8s.io/v1\nkind: StorageClass\nmetadata: {name: %s}\nprovisioner: %s\nparameters: {image: "%s", clipVersion: "2"}\n---\n' "$1" "$driver" "$2"
}
reader() { # name claim
  pod "$1" 'wc -c < /image/srv/large' | sed '/^  - name: image$/,$d'
  printf '  - name: image\n    persistentVolumeClaim: {claimName: %s, readOnly: true}\n' "$2"
}
no_volumes() { ! k get pv -o jsonpath='{.items[*].spec.csi.driver}' | grep -q "$driver"; }
bound() { [ "$(k get pvc "$1" -o jsonpath='{.status.phase}')" = Bound ]; }
# The directory is there as long as a record is.
records() { { find "$work/s3/data/store/clip/volumes" -name '*.json' 2> /dev/null || true; } | wc -l; }
# A record goes with its volume, a moment after the claim.
eventually 120 'no volume is left of the scenarios before' no_volumes
before=$(records)
{ class e2e-python "$volume_image"; class e2e-files "$registry/team/files:30000"; claim one e2e-python; claim two e2e-python; } | k apply -f - > /dev/null
for name in one two; do eventually 120 "claim $name is bound" bound $name; done
same 'records of volumes in the store' $((before + 2)) "$(records)"
{ reader read-one one; echo ---; reader read-two two; } | k apply -f - > /dev/null
for name in one two; do
  succeeded read-$name 120
  same "what read-$name read" 2880000 "$(k logs read-$name)"
done
gone 60 read-one read-two
if $own_cluster; then
  claim three e2e-files | k apply -f - > /dev/null
  # In the middle of its work, with luck; whenever it is, the claim must be bound afterwards, once.
  eventually 60 'the controller has heard of it' event_contains three 'External provisioner is provisioning'
  kill -KILL "$(plugin_pid controller)"
  eventually 180 'the claim is bound although the controller was killed' bound three
  same 'records of volumes in the store' $((before + 3)) "$(records)"
  note 'a controller killed in between: the claim is bound, one record'
  kw delete pvc three --timeout=60s > /dev/null
fi
kw delete pvc one two --timeout=60s > /dev/null
eventually 120 'the PersistentVolumes are deleted' no_volumes
same 'records that are left' "$before" "$(records)"
k delete storageclass e2e-python e2e-files > /dev/null
