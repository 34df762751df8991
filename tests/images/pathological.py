#!/usr/bin/env python3
"""pathological.py LAYOUT: an image of all that tars and layers can hold and most don't.

It is there twice: `latest`, and `oracle`, the same tree said in entries that umoci can unpack (it knows no sparse files of GNU's old form, and
no hard links to what comes later). A socket is not in it: a tar can't hold one.
"""
import os
import struct
import sys
import tarfile

# Nothing is written into the checkout.
sys.dont_write_bytecode = True
from oci import BORN, Layer, Layout  # noqa: E402

TINY, CROWD = 100_000, 100_000
# Well below PATH_MAX, with what a test puts before it.
DEEP = "/".join(f"level-{n:03}-of-a-deep-path" for n in range(130))
# Bytes that are no UTF-8, as Python writes them.
LATIN = b"\xe4\xf6\xfc\xff".decode("utf-8", "surrogateescape")


def bottom(layer):
    layer.add("hidden", b"below an opaque root\n")
    layer.add("hidden-too/file", b"below an opaque root, in a directory\n")


def main_layer(layer):
    layer.add("before-the-mark", b"hidden by no mark of its own layer\n")
    layer.opaque("")
    for n in range(TINY):
        layer.add(f"tiny/{n // 1000:02}/{n % 1000:03}", b"%d\n" % n * (n % 12))
    for n in range(CROWD):
        layer.add(f"crowded/entry-{n:06}", b"x" if n % 1000 == 0 else b"")
    layer.add(DEEP + "/file", b"down here\n")

    for name, mode in (("setuid", 0o4755), ("setgid", 0o2755), ("nothing", 0), ("all", 0o7777)):
        layer.add(f"modes/{name}", b"x", mode=mode)
    layer.dir("modes/sticky", 0o1777)
    layer.dir("modes/setgid-dir", 0o2770, owner=(7, 8))
    layer.add("modes/owners", b"x", owner=(3_000_000_000, 4_000_000_000))
    for name, mtime in (("epoch", 0), ("far", 1 << 33), ("before", -1000)):
        layer.add(f"times/{name}", b"x", mtime=mtime)
    layer.add("times/nanoseconds", b"x", pax_headers={"mtime": "1700000000.123456789"})

    capability = struct.pack("<5I", 0x0200_0001, 1 << 10, 0, 0, 0)
    attributes = {
        "text": {"user.note": b"value", "user.other": b"2"},
        "binary": {"user.binary": b"\x00\x01\xff\n=\x00"},
        "long": {"user.long": b"v" * 2000},
        "empty": {"user.empty": b""},
        "capability": {"security.capability": capability},
    }
    for name, each in attributes.items():
        layer.add(f"attributes/{name}", b"x", mode=0o755, pax_headers=xattrs(each))
    layer.dir("attributes/dir", pax_headers=xattrs({"user.of-a-directory": b"d"}))

    layer.add("special/fifo", kind=tarfile.FIFOTYPE, mode=0o620, owner=(1, 2))
    layer.add("special/null", kind=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
    layer.add("special/large-numbers", kind=tarfile.CHRTYPE, mode=0o600, devmajor=511, devminor=70_000)
    layer.add("special/block", kind=tarfile.BLKTYPE, mode=0o660, devmajor=7, devminor=1)

    layer.add("links/a/first", b"one file, many names\n", mode=0o640, owner=(5, 6))
    layer.hard_link("links/b/second", "links/a/first")
    layer.hard_link("links/b/deeper/third", "links/b/second")
    layer.hard_link("links/fourth", "./links/a/first")
    layer.link("links/symlink", "a/first")
    layer.hard_link("links/symlink-too", "links/symlink")
    layer.link("links/absolute", "/links/a/first")
    layer.link("links/nowhere", "../" * 40 + "nowhere")
    layer.link("links/loop", "loop")
    layer.link("through", "links")

    for name in (LATIN, "line\nbreak", "tab\tbell\a", "back\\slash", "-n", " ", "*", "grüße 世界 🎻", "n" * 255, "é" * 127):
        layer.add(f"names/{name}", b"named\n")
    layer.link("names/target", LATIN)
    # One name over ustar's 100 and 155 bytes, by PAX here and by GNU's entries below.
    layer.add("names/pax/" + "/".join(["long" * 20] * 8), b"by PAX\n")
    gnu(layer, "names/gnu/" + "/".join(["long" * 20] * 8), b"by GNU\n")
    gnu(layer, "names/gnu/link", kind=tarfile.SYMTYPE, link="/".join(["long" * 20] * 8))
    # Bytes in the header itself, as old tars have them.
    layer.dir("names")
    plain = tarfile.TarInfo("names/plain-" + LATIN)
    plain.size, plain.mtime = 6, 1
    layer.blocks(plain.tobuf(tarfile.GNU_FORMAT), b"plain\n")

    # No entry says what the directories are.
    implied = tarfile.TarInfo("implied/by/file")
    implied.size, implied.mtime = 8, 1
    layer.blocks(implied.tobuf(tarfile.USTAR_FORMAT), b"implied\n")

    for name in ("replaced-before", "replaced-after", "gone", "stays"):
        layer.add(f"siblings/{name}", b"lower\n")
    layer.add("opaque/lower", b"lower\n")
    layer.add("opaque/dir/lower", b"lower\n")
    layer.add("swap/file-to-dir", b"a file\n")
    layer.add("swap/dir-to-file/below", b"x")
    layer.add("swap/dir-to-link/below/deeper", b"x")
    layer.link("swap/link-to-dir", "../links")
    layer.link("swap/link-to-file", "../links/a/first")
    layer.add("swap/fifo-to-file", kind=tarfile.FIFOTYPE)
    layer.add("comes-back/lower", b"lower\n")
    for n in range(100):
        layer.add(f"tree-gone/{n % 10}/{n:02}", b"x")


def odd_layer(layer, plain):
    """What umoci can't unpack; `plain`: the same tree in entries that it can."""
    data = [(n * 9_000 + 17, b"data of extent %03d " % n * 20) for n in range(30)]
    for name, extents in (("many", data), ("begins", [(0, b"at the start")]), ("hole", [])):
        (pax_sparse if plain else old_sparse)(layer, f"sparse/gnu-{name}", 300_000, extents)
        pax_sparse(layer, f"sparse/pax-{name}", 300_000, extents)
        pax_sparse_0(layer, f"sparse/pax-0-{name}", 300_000, extents)
    # A reader that takes sparse data as contiguous reads on in this one.
    layer.add("sparse/behind", b"the next file\n" * 200_000)
    early = ("ahead/of-a-chain", "ahead/of-a-file"), ("ahead/of-a-file", "ahead/z/file")
    if not plain:
        for name, target in early:
            layer.hard_link(name, target)
    layer.add("ahead/z/file", b"its other names came first\n", mode=0o600, owner=(11, 12))
    if plain:
        for name, target in reversed(early):
            layer.hard_link(name, target)


def changes(layer):
    layer.dir("siblings")
    layer.add("siblings/replaced-before", b"upper, before its whiteout\n")
    layer.whiteout("siblings/replaced-before")
    layer.whiteout("siblings/replaced-after")
    layer.add("siblings/replaced-after", b"upper, after its whiteout\n")
    layer.whiteout("siblings/gone")
    layer.whiteout("siblings/was-never-there")
    layer.dir("opaque", 0o711)
    layer.add("opaque/before", b"upper, before the mark\n")
    layer.opaque("opaque")
    layer.add("opaque/after", b"upper, after the mark\n")
    layer.add("swap/file-to-dir/below", b"x")
    layer.add("swap/dir-to-file", b"a file now\n")
    layer.link("swap/dir-to-link", "file-to-dir")
    layer.add("swap/link-to-dir/below", b"x")
    layer.add("swap/link-to-file", b"a file now\n")
    layer.add("swap/fifo-to-file", b"a file now\n")
    layer.whiteout("comes-back")
    layer.whiteout("tree-gone")
    # One name of a file with four: the others stay what they were.
    layer.dir("links/b")
    layer.add("links/b/second", b"a file of its own now\n")
    layer.hard_link("links/from-above", "links/a/first")
    layer.add("tiny/00/000", b"changed\n")
    layer.dir("modes/sticky", 0o1750, owner=(9, 9))
    # Its parent is a symlink below: it lands in `links`.
    entry = tarfile.TarInfo("through/a-symlink")
    entry.size, entry.mtime = 8, 1
    layer.blocks(entry.tobuf(tarfile.USTAR_FORMAT), b"through\n")


def top(layer):
    layer.add("swap/file-to-dir", b"a file again\n")
    layer.add("swap/dir-to-file/below", b"a directory again\n")
    layer.add("comes-back/upper", b"upper\n")
    layer.whiteout("crowded/entry-000007")


def xattrs(values):
    return {"SCHILY.xattr." + name: value.decode("utf-8", "surrogateescape") for name, value in values.items()}


def gnu(layer, path, data=b"", **more):
    """An entry whose long names are entries of their own, as GNU tar writes them."""
    parent = ""
    for name in path.split("/")[:-1]:
        parent = os.path.join(parent, name)
        layer.dir(parent)
    info = tarfile.TarInfo(path)
    info.size, info.mtime = len(data), 1
    info.type, info.linkname = more.get("kind", tarfile.REGTYPE), more.get("link", "")
    if info.issym():
        info.mode = 0o777
    layer.blocks(info.tobuf(tarfile.GNU_FORMAT), data)


def sparse_map(size, extents):
    """Where data is, and that the file ends at `size`."""
    return [(at, len(data)) for at, data in extents] + [(size, 0)]


def octal(number):
    return b"%011o\0" % number


def old_sparse(layer, path, size, extents):
    """GNU's own form: 4 places in the header, 21 in each block behind it."""
    places = [octal(at) + octal(length) for at, length in sparse_map(size, extents)]
    data = b"".join(data for _, data in extents)
    info = tarfile.TarInfo(path)
    info.type, info.size, info.mtime = b"S", len(data), BORN
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    first, rest = places[:4], places[4:]
    header[386 : 386 + 24 * len(first)] = b"".join(first)
    header[482] = bool(rest)
    header[483:495] = octal(size)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = b""
    while rest:
        block, rest = rest[:21], rest[21:]
        more += b"".join(block).ljust(504, b"\0") + bytes([bool(rest)]) + bytes(7)
    layer.blocks(bytes(header) + more, data)


def pax_sparse(layer, path, size, extents):
    """GNU's form 1.0 in PAX: the map stands before the data."""
    places = sparse_map(size, extents)
    head = "".join(f"{number}\n" for number in [len(places), *(n for place in places for n in place)]).encode()
    head += bytes(-len(head) % 512)
    records = {"major": "1", "minor": "0", "name": path, "realsize": str(size)}
    add_sparse(layer, path, head + b"".join(data for _, data in extents), records)


def pax_sparse_0(layer, path, size, extents):
    """GNU's form 0.1 in PAX: the map is a record."""
    places = sparse_map(size, extents)
    numbers = ",".join(str(n) for place in places for n in place)
    records = {"name": path, "size": str(size), "numblocks": str(len(places)), "map": numbers}
    add_sparse(layer, path, b"".join(data for _, data in extents), records)


def add_sparse(layer, path, data, records):
    layer.dir("sparse")
    layer.add("sparse/GNUSparseFile.0", data, pax_headers={"GNU.sparse." + key: value for key, value in records.items()})


def main():
    layout = Layout(sys.argv[1])

    def write(make, *how):
        def into(out):
            layer = Layer(out)
            make(layer, *how)
            layer.tar.close()

        return layout.stream(["gzip", "-6", "-n"], into)

    below, above = [write(bottom), write(main_layer)], [write(changes), write(top)]
    layout.image("latest", [*below, write(odd_layer, False), *above])
    layout.image("oracle", [*below, write(odd_layer, True), *above])


if __name__ == "__main__":
    main()
