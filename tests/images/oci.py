"""Layers and OCI layouts, for the scripts that make images for tests."""
import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile

BORN = 1_700_000_000
OCI = "application/vnd.oci.image."


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Layer:
    """One layer's tar, written entry by entry. Directories come before what is in them, with a time of their own."""

    def __init__(self, out=None):
        self.raw = out or io.BytesIO()
        self.tar = tarfile.open(fileobj=self.raw, mode="w|" if out else "w", format=tarfile.PAX_FORMAT)
        self.dirs = set()

    def add(self, path, data=b"", kind=tarfile.REGTYPE, mode=0o644, owner=(0, 0), link="", mtime=BORN, **more):
        """`more`: other fields of tarfile.TarInfo."""
        parent = os.path.dirname(path)
        if parent and parent not in self.dirs:
            self.dir(parent)
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.linkname, info.size, info.mtime = kind, mode, link, len(data), mtime
        info.uid, info.gid = owner
        for name, value in more.items():
            setattr(info, name, value)
        self.tar.addfile(info, io.BytesIO(data))

    def dir(self, path, mode=0o755, owner=(0, 0), **more):
        if path not in self.dirs:
            self.add(path, kind=tarfile.DIRTYPE, mode=mode, owner=owner, **more)
            self.dirs.add(path)

    def link(self, path, target):
        self.add(path, kind=tarfile.SYMTYPE, mode=0o777, link=target)

    def hard_link(self, path, target):
        self.add(path, kind=tarfile.LNKTYPE, link=target)

    def file(self, path, source):
        """A file of this machine, as it is."""
        info = os.stat(source)
        with open(source, "rb") as f:
            self.add(path, f.read(), mode=info.st_mode & 0o7777, mtime=int(info.st_mtime))

    def whiteout(self, path):
        parent, name = os.path.split(path)
        self.add(os.path.join(parent, ".wh." + name))

    def opaque(self, path):
        self.add(os.path.join(path, ".wh..wh..opq"))

    def blocks(self, *parts):
        """Bytes as they are, each part filled up to a whole block."""
        for part in parts:
            part += bytes(-len(part) % 512)
            self.tar.fileobj.write(part)
            self.tar.offset += len(part)

    def bytes(self):
        self.tar.close()
        return self.raw.getvalue()


class Layout:
    """An OCI layout in a directory, to which layers and images are added."""

    def __init__(self, path):
        self.path = path
        self.blobs = os.path.join(path, "blobs/sha256")
        os.makedirs(self.blobs, exist_ok=True)

    def blob(self, data, media_type):
        with open(os.path.join(self.blobs, sha(data)), "wb") as f:
            f.write(data)
        return {"mediaType": media_type, "digest": "sha256:" + sha(data), "size": len(data)}

    def layer(self, tar):
        """(descriptor, diff ID) of a tar in memory, which is stored with gzip."""
        return self.blob(gzip.compress(tar, 6, mtime=0), OCI + "layer.v1.tar+gzip"), "sha256:" + sha(tar)

    def stream(self, command, write):
        """The same of what `write` writes to its argument; the filter `command` compresses it on its way to the disk."""
        part = os.path.join(self.blobs, "part")
        with open(part, "wb") as out:
            packer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out)
            tee = Hashing(packer.stdin)
            write(tee)
            packer.stdin.close()
            if packer.wait() != 0:
                raise OSError(f"{command[0]} failed")
        with open(part, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        os.rename(part, os.path.join(self.blobs, digest))
        size = os.path.getsize(os.path.join(self.blobs, digest))
        descriptor = {"mediaType": OCI + "layer.v1.tar+gzip", "digest": "sha256:" + digest, "size": size}
        return descriptor, "sha256:" + tee.hash.hexdigest()

    def image(self, tag, layers, config=None):
        """Adds an image of layers (descriptor, diff ID), lowest first."""
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": config or {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI + "manifest.v1+json",
            "config": self.blob(json.dumps(config).encode(), OCI + "config.v1+json"),
            "layers": [descriptor for descriptor, _ in layers],
        }
        entry = self.blob(json.dumps(manifest).encode(), OCI + "manifest.v1+json")
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        index = os.path.join(self.path, "index.json")
        entries = []
        if os.path.exists(index):
            with open(index) as f:
                entries = json.load(f)["manifests"]
        with open(index, "w") as f:
            json.dump({"schemaVersion": 2, "manifests": entries + [entry]}, f)
        with open(os.path.join(self.path, "oci-layout"), "w") as f:
            f.write('{"imageLayoutVersion":"1.0.0"}')


class Hashing:
    """Passes on what is written to it, and hashes it."""

    def __init__(self, out):
        self.out = out
        self.hash = hashlib.sha256()

    def write(self, data):
        self.hash.update(data)
        return self.out.write(data)


def write_upper(upper, out):
    """Writes the upper directory of an overlayfs (or any directory) as a layer: its deletions become whiteouts."""
    tar = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT)

    def visit(path, name):
        info = os.lstat(path)
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            parent, base = os.path.split(name)
            gone = tarfile.TarInfo(os.path.join(parent, ".wh." + base))
            gone.mtime = int(info.st_mtime)
            tar.addfile(gone)
            return
        # A socket: no tar can hold one.
        entry = tar.gettarinfo(path, name)
        if entry is None:
            return
        entry.uname = entry.gname = ""
        attributes = {x: os.getxattr(path, x, follow_symlinks=False) for x in os.listxattr(path, follow_symlinks=False)}
        opaque = attributes.get("trusted.overlay.opaque") == b"y"
        for attribute, value in attributes.items():
            if not attribute.startswith("trusted.overlay."):
                entry.pax_headers["SCHILY.xattr." + attribute] = value.decode("utf-8", "surrogateescape")
        if entry.isreg():
            with open(path, "rb") as f:
                tar.addfile(entry, f)
            return
        tar.addfile(entry)
        if entry.isdir():
            if opaque:
                mark = tarfile.TarInfo(os.path.join(name, ".wh..wh..opq"))
                mark.mtime = int(info.st_mtime)
                tar.addfile(mark)
            for child in sorted(os.listdir(path)):
                visit(os.path.join(path, child), os.path.join(name, child))

    for child in sorted(os.listdir(upper)):
        visit(os.path.join(upper, child), child)
    tar.close()
