#!/usr/bin/env python3
"""Writes an image of one static binary and the CA roots as an OCI archive: what the Dockerfile makes, without a Docker engine.

Usage: image.py BINARY OUT.tar NAME:TAG VERSION [REVISION]
The same input gives the same bytes. `ctr -n k8s.io images import OUT.tar` names it NAME:TAG;
`skopeo copy oci-archive:OUT.tar docker://…` pushes it.
"""
import gzip
import hashlib
import io
import json
import os
import struct
import sys
import tarfile

# ELF's e_machine, and what OCI calls it.
ARCHITECTURES = {62: ("amd64", None), 183: ("arm64", "v8")}
PT_INTERP = 3
CA_ROOTS = "/etc/ssl/certs/ca-certificates.crt"
# The image's files besides the binary and the CA roots. glibc's resolver asks /etc/nsswitch.conf for the order; `files` and `dns`
# are built into a static binary, nothing else is.
FILES = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnonroot:x:65532:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\n",
}


def architecture(binary):
    """OCI's name for the binary's machine. Refuses one that needs a loader: there is none in the image."""
    if binary[:6] != b"\x7fELF\x02\x01":
        sys.exit("image: not a 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", binary, 18)
    (offset,) = struct.unpack_from("<Q", binary, 32)
    size, count = struct.unpack_from("<HH", binary, 54)
    if any(struct.unpack_from("<I", binary, offset + i * size)[0] == PT_INTERP for i in range(count)):
        sys.exit("image: the binary is dynamic; build it with .ci/release")
    if machine not in ARCHITECTURES:
        sys.exit(f"image: no name for ELF machine {machine}")
    return ARCHITECTURES[machine]


def tar(entries):
    """A tar of (name, bytes or None for a directory, mode): sorted, owned by root, of the epoch."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data, mode in sorted(entries, key=lambda entry: entry[0]):
            info = tarfile.TarInfo(name)
            info.mode = mode
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    return out.getvalue()


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def compact(value):
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def main():
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    source, out, name, version = sys.argv[1:5]
    revision = sys.argv[5] if len(sys.argv) == 6 else ""
    with open(source, "rb") as file:
        binary = file.read()
    arch, variant = architecture(binary)
    with open(CA_ROOTS, "rb") as file:
        roots = file.read()

    # Mount points are there, so that a read-only root needs nothing made.
    directories = ["etc", "etc/ssl", "etc/ssl/certs", "etc/clip-csi", "usr", "usr/bin", "var", "var/lib", "var/lib/clip-csi"]
    entries = [(d, None, 0o755) for d in directories] + [("tmp", None, 0o1777)]
    entries += [(path, text.encode(), 0o644) for path, text in FILES.items()]
    entries += [("usr/bin/clip-csi", binary, 0o755), (CA_ROOTS[1:], roots, 0o644)]
    layer = tar(entries)
    packed = gzip.compress(layer, compresslevel=9, mtime=0)

    labels = {
        "org.opencontainers.image.title": "clip-csi",
        "org.opencontainers.image.description": "Kubernetes CSI driver: container images as volumes, fetched as they are read",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.source": "https://github.com/beam-cloud/clip-csi",
        "org.opencontainers.image.version": version,
    }
    if revision:
        labels["org.opencontainers.image.revision"] = revision
    where = {"architecture": arch, "os": "linux"}
    if variant:
        where["variant"] = variant
    config = compact(
        where
        | {
            "config": {"Entrypoint": ["/usr/bin/clip-csi"], "Env": ["PATH=/usr/bin"], "WorkingDir": "/", "Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
            "history": [{"created_by": "one static binary, the CA roots, nsswitch.conf"}],
        }
    )
    oci = "application/vnd.oci.image"
    described = lambda kind, data: {"mediaType": f"{oci}.{kind}", "digest": digest(data), "size": len(data)}
    manifest = compact(
        {
            "schemaVersion": 2,
            "mediaType": f"{oci}.manifest.v1+json",
            "config": described("config.v1+json", config),
            "layers": [described("layer.v1.tar+gzip", packed)],
            "annotations": labels,
        }
    )
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1]}
    index = compact(
        {
            "schemaVersion": 2,
            "mediaType": f"{oci}.index.v1+json",
            "manifests": [described("manifest.v1+json", manifest) | {"annotations": names, "platform": where}],
        }
    )
    blobs = [(f"blobs/sha256/{digest(b)[7:]}", b, 0o644) for b in (config, manifest, packed)]
    archive = tar(
        [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644), ("index.json", index, 0o644)]
        + [("blobs", None, 0o755), ("blobs/sha256", None, 0o755)]
        + blobs
    )
    with open(out + ".new", "wb") as file:
        file.write(archive)
    os.replace(out + ".new", out)
    mib = lambda n: f"{n / (1 << 20):.1f} MiB"
    print(f"{out}: {name}, linux/{arch}, {digest(manifest)}, {mib(len(packed))} compressed, {mib(len(layer))} unpacked")


main()
