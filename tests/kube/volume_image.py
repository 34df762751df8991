#!/usr/bin/env python3
"""Makes an image for volumes, of several gzip layers, in an OCI layout.

Usage: volume_image.py LAYOUT TAG small | python | files:N

small   a few files of every kind that a layer can hold, changed and deleted by later layers
python  small, and this machine's /usr/bin/python3 with its library: `chroot IMAGE python3` works
files:N small, and N files of 0 to 8 KiB in directories of 100
The same call gives the same bytes on the same machine.
"""
import hashlib
import os
import subprocess
import sys
import tarfile

# Nothing is written into the checkout.
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../images"))
from oci import Layer, Layout  # noqa: E402


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
    layout = Layout(layout)
    layout.image(tag, [layout.layer(layer.bytes()) for layer in layers])


if __name__ == "__main__":
    main()
