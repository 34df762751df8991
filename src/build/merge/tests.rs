use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::tar::Walker;
use super::super::testing::{Header, Tar, record};
use super::*;

fn entries(tar: &[u8]) -> Vec<TarEntry> {
    let mut walker = Walker::new();
    let mut out = Vec::new();
    walker.push(tar, &mut |entry| out.push(entry)).unwrap();
    out
}

/// Path -> what is there: `dir 755`, `file <content>`, `link <target>`; names of one inode get `=<first name>`.
fn try_merge(layers: &[Tar]) -> Result<BTreeMap<String, String>, MergeError> {
    let mut merger = Merger::new();
    for (i, layer) in layers.iter().enumerate() {
        merger.apply(BlobIx(i as u16), entries(&layer.clone().end()))?;
    }
    let mut out = BTreeMap::new();
    let mut groups: BTreeMap<u64, String> = BTreeMap::new();
    merger.finish("", &mut |path, entry| {
        let path = String::from_utf8(path).unwrap();
        let text = match entry.kind {
            Kind::Dir => format!("dir {:o}", entry.mode),
            Kind::Symlink => format!("link {}", String::from_utf8_lossy(&entry.target)),
            Kind::File => {
                let data = &layers[usize::from(entry.blob.0)].bytes[entry.offset as usize..][..entry.size as usize];
                format!("file {}", String::from_utf8_lossy(data))
            }
            other => format!("{other:?} {}", entry.rdev),
        };
        let first = if entry.link_group > 0 { groups.entry(entry.link_group).or_insert(path.clone()) } else { &path };
        let text = if *first == path { text } else { format!("{text} ={first}") };
        assert!(out.insert(path, text).is_none());
    });
    Ok(out)
}

fn merge(layers: &[Tar]) -> Vec<String> {
    try_merge(layers).unwrap().into_iter().map(|(path, what)| format!("{path}: {what}")).collect()
}

fn fails(layers: &[Tar]) -> String {
    try_merge(layers).unwrap_err().to_string()
}

#[test]
fn whiteouts_hide_lower_layers_only_wherever_they_stand() {
    let lower = Tar::new().dir("d").file("d/a", "1").file("d/b", "1").file("keep", "1");
    let want = ["/: dir 755", "/d: dir 755", "/d/a: file 2", "/keep: file 1"];
    let before = Tar::new().file("d/.wh.a", "").file("d/.wh.b", "").file("d/a", "2");
    let after = Tar::new().file("d/a", "2").file("d/.wh.b", "").file("d/.wh.a", "");
    assert_eq!(merge(&[lower.clone(), before]), want);
    assert_eq!(merge(&[lower.clone(), after]), want);
    let opaque_last = Tar::new().dir("d").file("d/a", "2").file("d/.wh..wh..opq", "");
    let opaque_first = Tar::new().file("d/.wh..wh..opq", "").file("d/a", "2");
    assert_eq!(merge(&[lower.clone(), opaque_last]), want);
    assert_eq!(merge(&[lower.clone(), opaque_first]), want);
    // A whole directory, made anew in the same layer, in both orders; and the root.
    let anew = ["/: dir 755", "/d: dir 755", "/d/n: file 2", "/keep: file 1"];
    assert_eq!(merge(&[lower.clone(), Tar::new().file("d/n", "2").file(".wh.d", "")]), anew);
    assert_eq!(merge(&[lower.clone(), Tar::new().file(".wh.d", "").file("d/n", "2")]), anew);
    assert_eq!(merge(&[lower.clone(), Tar::new().file(".wh..wh..opq", "")]), ["/: dir 755"]);
    // Nothing there to hide.
    assert_eq!(merge(&[Tar::new().file("d/.wh.x", "").file("no/.wh..wh..opq", "")]), ["/: dir 755"]);
}

#[test]
fn a_whiteout_in_the_layer_above_does_hide() {
    let layers = [Tar::new().file("a", "1"), Tar::new().file(".wh.a", ""), Tar::new().file("a", "3")];
    assert_eq!(merge(&layers[..2]), ["/: dir 755"]);
    assert_eq!(merge(&layers), ["/: dir 755", "/a: file 3"]);
}

#[test]
fn names_that_can_be_neither_whiteout_nor_file_are_refused() {
    for (name, word) in [(".wh.", "hides"), ("d/.wh..", "hides"), (".wh...", "hides"), ("d/.wh.x/y", "directory")] {
        let message = fails(&[Tar::new().file(name, "")]);
        assert!(message.contains(name) && message.contains(word), "{message}");
    }
}

#[test]
fn a_hard_link_to_a_later_file_stays_where_it_was_put_when_its_path_comes_to_lead_elsewhere() {
    let lower = Tar::new().dir("usr").symlink("lib", "usr");
    let upper = Tar::new().hardlink("lib/x", "later").dir("lib").file("later", "2");
    let want = ["/: dir 755", "/later: file 2", "/lib: dir 755", "/usr: dir 755", "/usr/x: file 2 =/later"];
    assert_eq!(merge(&[lower.clone(), upper]), want);
    let nowhere = Tar::new().hardlink("lib/x", "nowhere").dir("lib");
    assert!(fails(&[lower, nowhere]).contains("/nowhere, which is in no layer"));
}

#[test]
fn what_aufs_kept_for_itself_is_dropped_whatever_its_names_and_never_lands_elsewhere() {
    let odd = Tar::new()
        .file("a", "1")
        .file(".wh..wh.plnk/.wh.x/.wh.y", "2")
        .file(".wh..wh.plnk/n", "3")
        .hardlink("l", ".wh..wh.plnk/n");
    assert_eq!(merge(&[odd]), ["/: dir 755", "/a: file 1", "/l: file 3"]);
    for path in [".wh..wh.s/.wh.x", ".wh..wh.s/.wh.x/y"] {
        let message = fails(&[Tar::new().dir("etc").symlink(".wh..wh.s", "etc").file(path, "")]);
        assert!(message.contains(path) && message.contains("AUFS"), "{message}");
    }
}

#[test]
fn replacement_drops_the_subtree_and_directories_merge() {
    let lower = Tar::new().dir("d").file("d/x", "1").dir("e").file("e/x", "1").file("f", "1").symlink("s", "d");
    let mut dir = Header::new(b'5', "e/");
    dir.mode = 0o1777;
    let upper = Tar::new().file("d", "2").raw(&dir, &[]).dir("f").file("f/y", "2").dir("s");
    let want =
        ["/: dir 755", "/d: file 2", "/e: dir 1777", "/e/x: file 1", "/f: dir 755", "/f/y: file 2", "/s: dir 755"];
    assert_eq!(merge(&[lower, upper]), want);
}

#[test]
fn missing_parents_are_implied_and_a_lower_file_gives_way() {
    assert_eq!(merge(&[Tar::new().file("a/b/c", "1")])[1..3], ["/a: dir 755", "/a/b: dir 755"]);
    assert_eq!(
        merge(&[Tar::new().file("a", "1"), Tar::new().file("a/b", "2")]),
        ["/: dir 755", "/a: dir 755", "/a/b: file 2"]
    );
    let message = fails(&[Tar::new().file("a", "1").file("a/b", "2")]);
    assert!(message.contains("/a/b") && message.contains("same layer"), "{message}");
}

#[test]
fn the_root_takes_its_own_entry() {
    let mut root = Header::new(b'5', "./");
    root.mode = 0o700;
    assert_eq!(merge(&[Tar::new().raw(&root, &[])]), ["/: dir 700"]);
    assert!(fails(&[Tar::new().file("./", "")]).contains("root of the image"));
}

#[test]
fn symlinks_in_the_parent_path_are_followed_inside_the_image() {
    let lower = Tar::new()
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("abs", "/usr/lib")
        .symlink("out", "../../../usr")
        .symlink("dangling", "new/place")
        .symlink("usr/up", "../usr/lib");
    let upper = Tar::new()
        .file("lib/a", "a")
        .file("abs/b", "b")
        .file("out/lib/c", "c")
        .file("dangling/d", "d")
        .file("usr/up/e", "e")
        .hardlink("lib/h", "abs/a");
    let tree = merge(&[lower.clone(), upper]);
    for want in [
        "/lib: link usr/lib",
        "/usr/lib/a: file a",
        "/usr/lib/b: file b",
        "/usr/lib/c: file c",
        "/new/place/d: file d",
        "/usr/lib/e: file e",
        "/usr/lib/h: file a =/usr/lib/a",
    ] {
        assert!(tree.iter().any(|line| line == want), "{want} not in {tree:#?}");
    }
    let tree = merge(&[lower, Tar::new().file("lib/a", "a"), Tar::new().file("lib/.wh.a", "")]);
    assert!(!tree.iter().any(|line| line.contains("/a:")), "{tree:#?}");
    let ring = Tar::new().symlink("x", "y").symlink("y", "x").file("x/f", "");
    assert!(fails(&[ring]).contains("40 symlinks"));
}

#[test]
fn an_opaque_directory_in_place_of_a_symlink_leaves_the_symlinks_target_alone() {
    let lower = Tar::new().file("usr/lib/x", "1").symlink("lib", "usr/lib");
    let want = ["/: dir 755", "/lib: dir 755", "/usr: dir 755", "/usr/lib: dir 755", "/usr/lib/x: file 1"];
    for upper in [
        Tar::new().dir("lib").file("lib/.wh..wh..opq", "").file("lib/.wh.x", ""),
        Tar::new().file("lib/.wh..wh..opq", "").file("lib/.wh.x", "").dir("lib"),
    ] {
        assert_eq!(merge(&[lower.clone(), upper]), want);
    }
}

#[test]
fn hard_links_name_one_file_and_outlive_each_other() {
    let lower = Tar::new().file("a", "1").hardlink("b", "a").hardlink("c", "/b");
    assert_eq!(merge(std::slice::from_ref(&lower))[1..], ["/a: file 1", "/b: file 1 =/a", "/c: file 1 =/a"]);
    assert_eq!(merge(&[lower.clone(), Tar::new().file("a", "2").file(".wh.c", "")])[1..], ["/a: file 2", "/b: file 1"]);
    // To a lower layer, to a later entry, to a chain of later ones, to a symlink.
    assert_eq!(merge(&[lower, Tar::new().hardlink("z", "a")])[4], "/z: file 1 =/a");
    let later = Tar::new().hardlink("a", "b").hardlink("b", "c").file("c", "1");
    assert_eq!(merge(&[later])[1..], ["/a: file 1", "/b: file 1 =/a", "/c: file 1 =/a"]);
    let symlink = Tar::new().symlink("s", "nowhere").hardlink("t", "s");
    assert_eq!(merge(&[symlink])[1..], ["/s: link nowhere", "/t: link nowhere =/s"]);
}

#[test]
fn a_link_sees_its_target_as_of_its_place_in_the_stream() {
    let lower = Tar::new().file("a", "1");
    let upper = Tar::new().hardlink("b", "a").file("a", "2");
    assert_eq!(merge(&[lower.clone(), upper])[1..], ["/a: file 2", "/b: file 1"]);
    // A rename as some differs write it: a link to what the same layer hides.
    let moved = Tar::new().file(".wh.a", "").hardlink("b", "a");
    assert_eq!(merge(&[lower, moved])[1..], ["/b: file 1"]);
}

#[test]
fn a_link_to_nothing_names_both() {
    for layer in [
        Tar::new().hardlink("dir/name", "no/target"),
        Tar::new().hardlink("dir/name", "no/target").hardlink("no/target", "dir/name"),
        Tar::new().hardlink("dir/name", "no/target").hardlink("no/target", "no/target"),
    ] {
        let message = fails(&[layer]);
        assert!(message.contains("/no/target") && message.contains("in no layer"), "{message}");
    }
    assert!(fails(&[Tar::new().dir("d").hardlink("l", "d")]).contains("which is a directory"));
    // A link that waits is forgotten once its name is taken by something else.
    assert_eq!(merge(&[Tar::new().hardlink("l", "no").file("l", "1")])[1..], ["/l: file 1"]);
    assert_eq!(merge(&[Tar::new().hardlink("d/l", "no").file("d", "1")])[1..], ["/d: file 1"]);
}

#[test]
fn aufs_bookkeeping_serves_links_and_is_not_shown() {
    let layer = Tar::new().file(".wh..wh.plnk/1.2", "1").hardlink("a", ".wh..wh.plnk/1.2").file(".wh..wh.aufs", "");
    assert_eq!(merge(&[layer])[1..], ["/a: file 1"]);
}

#[test]
fn special_files_modes_owners_and_attributes_are_kept() {
    let mut device = Header::new(b'4', "dev/sda");
    (device.major, device.minor, device.mode, device.uid) = (8, 1, 0o6660, 7);
    let layer = Tar::new()
        .pax(&[record("SCHILY.xattr.security.capability", b"\x01\0")])
        .raw(&device, &[])
        .raw(&Header::new(b'6', "fifo"), &[]);
    let mut merger = Merger::new();
    merger.apply(BlobIx(0), entries(&layer.end())).unwrap();
    let mut found = Vec::new();
    merger.finish("/rootfs", &mut |path, entry| found.push((String::from_utf8(path).unwrap(), entry)));
    let names: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(names, ["/rootfs", "/rootfs/dev", "/rootfs/dev/sda", "/rootfs/fifo"]);
    let sda = &found[2].1;
    assert_eq!((sda.kind, sda.mode, sda.uid, sda.rdev), (Kind::BlockDevice, 0o6660, 7, 0x801));
    assert_eq!(sda.xattrs, [(b"security.capability".to_vec(), b"\x01\0".to_vec())]);
    assert_eq!(found[3].1.kind, Kind::Fifo);
    assert_eq!(found[1].1.mtime.sec, 1_700_000_000);
}

#[test]
fn paths_that_grow_through_symlinks_stay_bounded() {
    let deep = vec!["d"; 1500].join("/");
    let grow = format!("{deep}/l");
    let layer = Tar::new().pax(&[record("path", &grow), record("linkpath", &deep)]).symlink("x", "y");
    let mut merger = Merger::new();
    merger.apply(BlobIx(0), entries(&layer.end())).unwrap();
    let next = Tar::new().pax(&[record("path", format!("{grow}/f"))]).file("x", "");
    let error = merger.apply(BlobIx(1), entries(&next.end())).unwrap_err();
    assert!(error.detail.contains("4095"), "{error}");
}

/// Later layers would take it for a whiteout, and so would whoever archives what we extract.
#[test]
fn no_directory_comes_to_be_behind_a_symlink_to_a_whiteouts_name() {
    for (link, file) in [(".wh.a", "c/f"), ("/x/.wh.a", "c/y/f")] {
        let layer = Tar::new().symlink("c", link).file(file, "x");
        let error = Merger::new().apply(BlobIx(0), entries(&layer.end())).unwrap_err();
        assert!(error.detail.contains(".wh."), "{error}");
    }
}

/// Small names, so that random layers collide.
fn name() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "c", ".wh.a", ".wh.b", ".wh..wh..opq", "..", "."]);
    prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
}

proptest! {
    #[test]
    fn random_layers_never_panic_and_every_name_has_its_directory(
        layers in prop::collection::vec(prop::collection::vec((0_u8..4, name(), name()), 0..12), 1..4)
    ) {
        let layers: Vec<Tar> = layers.into_iter().map(|entries| {
            entries.into_iter().fold(Tar::new(), |tar, (kind, name, other)| match kind {
                _ if name.contains("..") && !name.contains(".wh") => tar,
                0 => tar.file(name, "x"),
                1 => tar.dir(name),
                2 => tar.symlink(name, other),
                _ if other.contains("..") => tar,
                _ => tar.hardlink(name, other),
            })
        }).collect();
        let mut merger = Merger::new();
        for (i, layer) in layers.iter().enumerate() {
            let mut walker = Walker::new();
            let mut all = Vec::new();
            if walker.push(&layer.clone().end(), &mut |e| all.push(e)).is_err() { return Ok(()); }
            if merger.apply(BlobIx(i as u16), all).is_err() { return Ok(()); }
        }
        let mut seen = BTreeMap::new();
        merger.finish("", &mut |path, entry| { seen.insert(path, entry.kind); });
        for path in seen.keys().filter(|p| *p != b"/") {
            let (parent, name) = split(path);
            let parent = if parent.is_empty() { b"/" } else { parent };
            prop_assert_eq!(seen.get(parent), Some(&Kind::Dir));
            prop_assert!(!name.starts_with(b".wh."));
        }
    }
}
