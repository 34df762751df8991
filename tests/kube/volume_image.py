#!/usr/bin/env python3
"""Makes an image for volumes, of several gzip layers, in an OCI layout.

Usage: volume_image.py LAYOUT TAG small | python | files:N

small   a few files of every kind that a layer can hold, changed and deleted by later layers
python  small, and this machine's /usr/bin/python3 with its library: `chroot IMAGE python3` works
files:N small, and N files of 0 to 8 KiB in directories of 100
The same call gives the same bytes on the same machine.
"""
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile

BORN = 1_700_000_000


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Layer:
    """One layer's tar. Directories come before what is in them, with a time of their own."""

    def __init__(self):
        self.raw = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.raw, mode="w", format=tarfile.PAX_FORMAT)
        self.dirs = set()

    def add(self, path, data=b"", kind=tarfile.REGTYPE, mode=0o644, owner=(0, 0), link="", mtime=BORN):
        parent = os.path.dirname(path)
        if parent and parent not in self.dirs:
            self.dir(parent)
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.linkname, info.size, info.mtime = kind, mode, link, len(data), mtime
        info.uid, info.gid = owner
        self.tar.addfile(info, io.BytesIO(data))

    def dir(self, path, mode=0o755, owner=(0, 0)):
        if path not in self.dirs:
            self.add(path, kind=tarfile.DIRTYPE, mode=mode, owner=owner)
            self.dirs.add(path)

    def link(self, path, target):
        self.add(path, kind=tarfile.SYMTYPE, mode=0o777, link=target)

    def file(self, path, source):
        """A file of this machine, as it is."""
        stat = os.stat(source)
        with open(source, "rb") as f:
            self.add(path, f.read(), mode=stat.st_mode & 0o7777, mtime=int(stat.st_mtime))

    def bytes(self):
        self.tar.close()
        return self.raw.getvalue()


def base():
    layer = Layer()
    for path in ("bin", "dev", "etc", "proc", "root", "sys", "usr", "var"):
        layer.dir(path)
    layer.dir("tmp", 0o1777)
    release = b'PRETTY_NAME="clip-csi test image"\nNAME="clip-csi test image"\nID=clip-csi-test\n'
    layer.add("etc/os-release", release)
    layer.add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    layer.add("etc/empty")
    layer.add("etc/deleted-later", b"x")
    layer.add("etc/replaced-later", b"old")
    layer.add("srv/opaque-later/gone", b"x")
    layer.add("srv/private", b"for uid 1000 only\n", mode=0o400, owner=(1000, 1000))
    layer.add("srv/setuid", b"#!/bin/sh\n", mode=0o4755)
    layer.add("srv/shared/by-group", b"g\n", mode=0o640, owner=(0, 1000))
    layer.add("srv/one-name", b"two names\n")
    layer.add("srv/two-names", kind=tarfile.LNKTYPE, link="srv/one-name")
    layer.link("srv/dangling", "/nowhere/at/all")
    layer.link("srv/up", "../etc/os-release")
    layer.add("srv/" + "long" * 50, b"a long name\n")
    layer.add("srv/grüße 世界", b"not ASCII\n")
    # Two spans and a bit, so that a read can begin in the middle.
    layer.add("srv/large", b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(90_000)))
    return layer


def changes():
    layer = Layer()
    layer.dir("etc")
    layer.add("etc/.wh.deleted-later")
    layer.add("etc/replaced-later", b"new and longer\n", mode=0o600)
    layer.dir("srv/opaque-later")
    layer.add("srv/opaque-later/.wh..wh..opq")
    layer.add("srv/opaque-later/new", b"only this\n")
    return layer


def python():
    layer = Layer()
    real = os.path.realpath("/usr/bin/python3")
    version = os.path.basename(real)
    library = f"/usr/lib/{version}"
    needed = [real]
    layer.file(f"usr/bin/{version}", real)
    layer.link("usr/bin/python3", version)
    for place, dirs, files in os.walk(library):
        dirs[:] = sorted(d for d in dirs if d not in ("__pycache__", "test", "idlelib", "dist-packages"))
        layer.dir(place.lstrip("/"))
        for name in sorted(files):
            path = os.path.join(place, name)
            if not os.path.isfile(path):
                continue
            layer.file(path.lstrip("/"), path)
            if ".so" in name:
                needed.append(path)
    libraries = set()
    for path in needed:
        for word in subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout.split():
            if word.startswith("/"):
                libraries.add(word)
    for path in sorted(libraries):
        layer.file(path.lstrip("/"), path)
    return layer


def files(count):
    layer = Layer()
    for n in range(count):
        seed = hashlib.sha256(b"file %d" % n).digest()
        # Half of it compresses well, as code does.
        size = int.from_bytes(seed[:2], "big") % 8192
        data = (seed * (size // 64 + 1))[: size // 2] + bytes(size - size // 2)
        layer.add(f"opt/many/{n // 100:04}/{n % 100:02}.py", data)
    return layer


def main():
    layout, tag, kind = sys.argv[1:]
    layers = [base()]
    if kind == "python":
        layers.append(python())
    elif kind.startswith("files:"):
        layers.append(files(int(kind.partition(":")[2])))
    elif kind != "small":
        sys.exit(__doc__)
    layers.append(changes())
    blobs = os.path.join(layout, "blobs/sha256")
    os.makedirs(blobs, exist_ok=True)

    def blob(data, media_type):
        with open(os.path.join(blobs, sha(data)), "wb") as f:
            f.write(data)
        return {"mediaType": media_type, "digest": "sha256:" + sha(data), "size": len(data)}

    oci = "application/vnd.oci.image."
    tars = [layer.bytes() for layer in layers]
    descriptors = [blob(gzip.compress(tar, 6, mtime=0), oci + "layer.v1.tar+gzip") for tar in tars]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + sha(tar) for tar in tars]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci + "manifest.v1+json",
        "config": blob(json.dumps(config).encode(), oci + "config.v1+json"),
        "layers": descriptors,
    }
    entry = blob(json.dumps(manifest).encode(), oci + "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = os.path.join(layout, "index.json")
    entries = json.load(open(index))["manifests"] if os.path.exists(index) else []
    with open(index, "w") as f:
        json.dump({"schemaVersion": 2, "manifests": entries + [entry]}, f)
    with open(os.path.join(layout, "oci-layout"), "w") as f:
        f.write('{"imageLayoutVersion":"1.0.0"}')


if __name__ == "__main__":
    main()
