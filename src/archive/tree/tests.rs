use super::super::ArchiveError;
use super::*;

fn at(sec: i64) -> Timestamp {
    Timestamp { sec, nsec: 7 }
}

fn entry(kind: Kind) -> Entry {
    Entry { mtime: at(1000), atime: at(1001), ctime: at(1002), ..Entry::new(kind, 0o755) }
}

fn file(offset: u64, size: u64) -> Entry {
    Entry { offset, size, ..entry(Kind::File) }
}

fn link(target: &str) -> Entry {
    Entry { target: target.into(), ..entry(Kind::Symlink) }
}

fn build(entries: impl IntoIterator<Item = (&'static str, Entry)>) -> Result<Tree, ArchiveError> {
    let mut builder = TreeBuilder::default();
    for (path, entry) in entries {
        builder.insert(path.as_bytes(), entry);
    }
    builder.finish()
}

fn find(tree: &Tree, path: &str) -> NodeId {
    tree.resolve(NodeId::ROOT, path.as_bytes(), false).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn paths(tree: &Tree) -> Vec<String> {
    tree.ids().map(|id| String::from_utf8(tree.path(id)).unwrap()).collect()
}

#[test]
fn the_arena_is_breadth_first_and_siblings_are_sorted_whatever_the_order_of_insertion() {
    let names = ["/b/x", "/a", "/b", "/b-c", "/b/a/deep", "/b/a", "/", "/b.d"];
    let expected = ["/", "/a", "/b", "/b-c", "/b.d", "/b/a", "/b/x", "/b/a/deep"];
    let dirs = ["/b", "/", "/b/a"];
    let of = |name: &'static str| (name, if dirs.contains(&name) { entry(Kind::Dir) } else { file(1, 1) });
    let tree = build(names.map(of)).unwrap();
    assert_eq!(paths(&tree), expected);
    let mut reversed = names;
    reversed.reverse();
    assert_eq!(build(reversed.map(of)).unwrap(), tree);
    for id in tree.ids() {
        let path = tree.path(id);
        assert_eq!(tree.resolve(NodeId::ROOT, &path, false), Ok(id));
        for child in tree.children(id) {
            assert_eq!(tree.parent(NodeId(child)), id);
        }
    }
    assert_eq!(tree.attr(find(&tree, "/b")).nlink, 3);
    assert_eq!(tree.get(7), Some(NodeId(7)));
    assert_eq!(tree.get(8), None);
}

#[test]
fn parents_without_an_entry_are_implied() {
    let tree = build([("/a/b/c", file(1, 1)), ("/a/x", entry(Kind::Dir))]).unwrap();
    assert_eq!(paths(&tree), ["/", "/a", "/a/b", "/a/x", "/a/b/c"]);
    for path in ["/", "/a", "/a/b"] {
        let attr = tree.attr(find(&tree, path));
        assert_eq!((attr.kind, attr.mode, attr.uid, attr.gid), (Kind::Dir, 0o755, 0, 0));
        assert_eq!((attr.mtime, attr.atime, attr.ctime), (at(1000), at(1000), at(1000)));
    }
    assert_eq!(paths(&build([]).unwrap()), ["/"]);
}

#[test]
fn what_no_kernel_could_show_is_refused_and_named() {
    let long_name = format!("/{}", "n".repeat(256));
    let deep = "/d".repeat(2048);
    let cases: &[(&[u8], &str)] = &[
        (b"", "slash"),
        (b"a", "slash"),
        (b"/a/", "empty"),
        (b"//a", "empty"),
        (b"/a/../b", ".."),
        (b"/..", ".."),
        (b"/./a", ".."),
        (b"/a\0b", "NUL"),
        (long_name.as_bytes(), "256 bytes"),
        (deep.as_bytes(), "4096 bytes"),
    ];
    for (path, word) in cases {
        let mut builder = TreeBuilder::default();
        builder.insert(path, file(1, 1));
        let error = builder.finish().unwrap_err().to_string();
        let shown = String::from_utf8_lossy(&path[..path.len().min(20)]).replace('\0', "\\0");
        assert!(error.contains(word) && error.contains(&shown), "{shown}: {error}");
        assert!(error.len() < 500, "{error}");
    }
    for (name, second) in [("/a", entry(Kind::Dir)), ("/a/b", file(1, 1)), ("/a", file(2, 2))] {
        let error = build([("/a", file(1, 1)), (name, second)]).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(build([("/", file(1, 1))]).is_err());
    assert!(build([("/", entry(Kind::Dir)), ("/", entry(Kind::Dir))]).is_err());
    assert!(build([("/l", link(&"t".repeat(4096)))]).is_err());
    assert!(build([("/f", file(u64::MAX, 2))]).is_err());
    assert!(build([("/f", file(2, u64::MAX))]).is_err());
}

#[test]
fn hard_links_share_the_inode_of_the_first_name_in_path_order() {
    let mut first = file(5, 10);
    (first.link_group, first.content_hash) = (9, Some(Digest::of(b"x")));
    first.xattrs = vec![(b"user.b".into(), b"2".into()), (b"user.a".into(), b"1".into())];
    let mut other = file(5, 10);
    other.link_group = 9;
    // Depth first `/a/z` comes before `/a-b`; as strings it is the other way round.
    let entries = [("/z", other.clone()), ("/a/z", other), ("/a-b", first), ("/single", file(5, 10))];
    let tree = build(entries).unwrap();
    let inode = find(&tree, "/a-b");
    for name in ["/z", "/a/z", "/a-b"] {
        let id = find(&tree, name);
        assert_eq!(tree.inode(id), inode);
        let attr = tree.attr(id);
        assert_eq!((attr.nlink, attr.size), (3, 10));
        assert_eq!(tree.content_hash(id), Some(Digest::of(b"x")));
        assert_eq!(tree.data(id), Data::Contiguous { blob: BlobIx(0), offset: 5 });
        let xattrs: Vec<_> = tree.xattrs(id).iter().map(|(name, value)| (&name[..], &value[..])).collect();
        assert_eq!(xattrs, [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"2")]);
    }
    assert_eq!(tree.attr(find(&tree, "/single")).nlink, 1);
    assert_eq!((tree.len(), tree.inodes(), tree.total_size()), (6, 4, 20));
    let mut symlink = link("x");
    symlink.link_group = 9;
    let mut file = file(1, 1);
    file.link_group = 9;
    assert!(build([("/a", symlink), ("/b", file)]).unwrap_err().to_string().contains("another type"));
}

#[test]
fn times_out_of_range_become_the_mtime_and_a_bad_mtime_the_epoch() {
    let zero = Timestamp { sec: 18_446_744_011_573_954_816u64 as i64, nsec: 0 };
    let mut entry = file(0, 0);
    (entry.atime, entry.ctime) = (zero, Timestamp { sec: 5, nsec: 1_000_000_000 });
    let mut worse = entry.clone();
    worse.mtime = zero;
    let extreme = [-(1i64 << 31), (1 << 34) - (1 << 31) - 1];
    let mut edge = entry.clone();
    edge.mtime = Timestamp { sec: extreme[0], nsec: 999_999_999 };
    edge.atime = Timestamp { sec: extreme[1], nsec: 999_999_999 };
    edge.ctime = Timestamp { sec: extreme[1] + 1, nsec: 0 };
    let tree = build([("/a", entry), ("/b", worse), ("/edge", edge.clone())]).unwrap();
    let times = |path| {
        let attr = tree.attr(find(&tree, path));
        [attr.atime, attr.mtime, attr.ctime]
    };
    assert_eq!(times("/a"), [at(1000); 3]);
    assert_eq!(times("/b"), [Timestamp::default(); 3]);
    assert_eq!(times("/edge"), [edge.atime, edge.mtime, edge.mtime]);
}

#[test]
fn every_kind_shows_what_it_has() {
    let mut device = entry(Kind::CharDevice);
    (device.rdev, device.mode) = (0x0501, 0o7777);
    let mut sparse = file(0, 100);
    let extents = vec![Extent { offset: 0, len: 10, blob_offset: 50 }, Extent { offset: 20, len: 80, blob_offset: 60 }];
    (sparse.extents, sparse.blob) = (Some(extents.clone()), BlobIx(3));
    let mut hole = file(0, 100);
    hole.extents = Some(Vec::new());
    let tree = build([
        ("/dev", device),
        ("/fifo", entry(Kind::Fifo)),
        ("/sock", entry(Kind::Socket)),
        ("/link", link("tar get")),
        ("/sparse", sparse.clone()),
        ("/hole", hole),
        ("/empty", file(77, 0)),
    ])
    .unwrap();
    let dev = tree.attr(find(&tree, "/dev"));
    assert_eq!((dev.kind, dev.rdev, dev.mode, dev.size), (Kind::CharDevice, 0x0501, 0o7777, 0));
    assert_eq!(tree.attr(find(&tree, "/fifo")).kind, Kind::Fifo);
    assert_eq!(tree.kind(find(&tree, "/sock")), Kind::Socket);
    let symlink = find(&tree, "/link");
    assert_eq!((tree.target(symlink), tree.attr(symlink).size), (&b"tar get"[..], 7));
    assert_eq!(tree.target(find(&tree, "/empty")), b"");
    assert_eq!(tree.data(find(&tree, "/sparse")), Data::Sparse { blob: BlobIx(3), extents: &extents });
    assert_eq!(tree.data(find(&tree, "/hole")), Data::Sparse { blob: BlobIx(0), extents: &[] });
    assert_eq!(tree.data(find(&tree, "/empty")), Data::Empty);
    assert_eq!(tree.total_size(), 200);

    let bad: &[&[(u64, u64, u64)]] =
        &[&[(0, 0, 0)], &[(10, 10, 0), (5, 1, 0)], &[(0, 10, 0), (9, 5, 9)], &[(99, 2, 0)], &[(0, 5, u64::MAX)]];
    for extents in bad {
        let extent = |&(offset, len, blob_offset): &_| Extent { offset, len, blob_offset };
        let mut sparse = sparse.clone();
        sparse.extents = Some(extents.iter().map(extent).collect());
        assert!(build([("/sparse", sparse)]).is_err(), "{extents:?}");
    }
}

#[test]
fn lookup_finds_names_and_only_names() {
    let tree = build([("/d/b", file(1, 1)), ("/d/a", file(1, 1)), ("/f", file(1, 1))]).unwrap();
    let d = find(&tree, "/d");
    assert_eq!(tree.lookup(d, b"a").map(|id| tree.path(id)), Some(b"/d/a".to_vec()));
    for absent in [&b""[..], b".", b"..", b"c", b"a/b", b"aa"] {
        assert_eq!(tree.lookup(d, absent), None);
    }
    assert_eq!(tree.lookup(find(&tree, "/f"), b"a"), None);
}

#[test]
fn resolving_never_leaves_the_root() {
    let tree = build([
        ("/etc/passwd", file(1, 1)),
        ("/r/etc/passwd", file(1, 1)),
        ("/r/up", link("../../../..")),
        ("/r/abs", link("/etc/passwd")),
        ("/r/rel", link("etc/../../etc/passwd")),
        ("/r/dir", link("etc/")),
        ("/r/filedir", link("etc/passwd/")),
        ("/r/loop1", link("loop2")),
        ("/r/loop2", link("./loop1")),
        ("/r/none", link("nowhere")),
    ])
    .unwrap();
    let root = find(&tree, "/r");
    let to = |path: &str, follow| {
        tree.resolve(root, path.as_bytes(), follow).map(|id| String::from_utf8(tree.path(id)).unwrap())
    };
    let ok = |path: &str| Ok(path.to_owned());
    assert_eq!(to("", true), ok("/r"));
    assert_eq!(to("/../..", true), ok("/r"));
    assert_eq!(to("up", true), ok("/r"));
    assert_eq!(to("up", false), ok("/r/up"));
    assert_eq!(to("up/", false), ok("/r"));
    assert_eq!(to("up/../etc", true), ok("/r/etc"));
    assert_eq!(to("abs", true), ok("/r/etc/passwd"));
    assert_eq!(to("rel", true), ok("/r/etc/passwd"));
    assert_eq!(to("dir/passwd", true), ok("/r/etc/passwd"));
    assert_eq!(to("loop1", true), Err(ResolveError::Loop));
    assert_eq!(to("none", true), Err(ResolveError::NotFound));
    assert_eq!(to("filedir", true), Err(ResolveError::NotADirectory));
    for path in ["etc/passwd/", "etc/passwd/.", "etc/passwd/..", "etc/passwd/x", "abs/x"] {
        assert_eq!(to(path, true), Err(ResolveError::NotADirectory), "{path}");
    }
}

/// 100,000 names, all files with times of their own and a content hash: the most that a common tree needs.
#[test]
fn a_node_takes_at_most_100_bytes_beside_its_name() {
    let mut builder = TreeBuilder::default();
    let mut names = 0;
    for n in 0..100_000u64 {
        let mut entry = file(n * 100, 50);
        (entry.mtime.sec, entry.uid) = (n as i64, (n % 7) as u32);
        entry.content_hash = Some(Digest::of(&n.to_le_bytes()));
        let path = format!("/{:03}/{:02}/file-{n}", n % 100, n % 50);
        names += path.rsplit('/').next().unwrap().len();
        builder.insert(path.as_bytes(), entry);
    }
    let tree = builder.finish().unwrap();
    let each = (tree.memory() - names) as f64 / tree.len() as f64;
    assert!(each <= 100.0, "{each:.1} bytes a node");
    assert_eq!(std::mem::size_of::<Node>(), 64);
}
