//! Which defects of the reference show where, in the images of `interop_all.rs`.

use std::path::Path;

use clip_csi::units::Digest;

use crate::reference::{
    DEVICE_NUMBERS_ARE_LOST, DEVICES_ARE_DROPPED, Defect, EXTRACTION, HARD_LINKS_ARE_COPIES, SPECIAL_BITS_ARE_LOST,
    SPECIAL_FILES_ARE_DROPPED, Seen, XATTRS_ARE_LOST, with_defects, without_root_time,
};

/// Whether an image has to show every defect, or may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceptions {
    MustShow,
    MayShow,
}

impl Exceptions {
    /// The tree as these defects show it.
    pub fn apply(self, tree: &Seen, lists: &[&[Defect]]) -> Seen {
        let (mut tree, defects) = (tree.clone(), lists.concat());
        match self {
            Self::MustShow => with_defects(tree, &defects),
            Self::MayShow => {
                defects.iter().for_each(|defect| (defect.of)(&mut tree));
                tree
            }
        }
    }
}

/// Without what an unpacker makes up: the times of directories that no entry describes.
pub fn settled(tree: Seen) -> Seen {
    let mut tree = without_root_time(tree);
    for path in ["implied", "implied/by"] {
        change(&mut tree, path, |facts| facts.mtime = (0, 0));
    }
    tree
}

fn change(tree: &mut Seen, path: &str, with: impl FnOnce(&mut crate::common::tree::Facts)) {
    if let Some(facts) = tree.get_mut(Path::new(path)) {
        with(facts);
    }
}

/// Where the expectation has no content, any but the right one: such a file must not turn out to be right after all.
pub fn wrong_where_expected(mut shown: Seen, expected: &Seen, right: &Seen) -> Seen {
    for (path, facts) in &mut shown {
        if facts.content.is_some() && expected.get(path).is_some_and(|e| e.kind == "file" && e.content.is_none()) {
            assert_ne!(facts.content, right[path].content, "{} is right", path.display());
            facts.content = None;
        }
    }
    shown
}

/// What its archiver makes of a directory.
pub const ARCHIVING: &[Defect] =
    &[FIFOS_HANG_IT, DEVICES_ARE_DROPPED, SPECIAL_BITS_ARE_LOST, HARD_LINKS_ARE_COPIES, XATTRS_ARE_LOST];

/// What its indexer makes of an image.
pub const INDEXING: &[Defect] = &[
    SPECIAL_FILES_ARE_DROPPED,
    SPECIAL_BITS_ARE_LOST,
    XATTRS_ARE_LOST,
    LINKS_TO_LATER_ENTRIES_ARE_LOST,
    OLD_SPARSE_FILES_ARE_DROPPED,
    SPARSE_FILES_ARE_TAKEN_AS_CONTIGUOUS,
    AN_OPAQUE_ROOT_HIDES_NOTHING,
    WHITEOUTS_HIDE_THEIR_OWN_LAYER,
    PARENTS_THAT_ARE_SYMLINKS_ARE_NOT_FOLLOWED,
];

/// What its mounts make of our archives.
pub const MOUNTING: &[Defect] = &[XATTRS_ARE_LOST, DEVICE_NUMBERS_ARE_LOST, A_MODE_OF_0_IS_SHOWN_AS_644];

/// Of an index over an image, in addition.
pub const MOUNTING_V2: &[Defect] = &[SPARSE_FILES_FAIL];

/// What its extractor makes of our archives.
pub const EXTRACTING: &[&[Defect]] = &[EXTRACTION, &[XATTRS_ARE_LOST]];

/// Of an index over an image, in addition.
pub const EXTRACTING_V2: &[Defect] = &[Defect {
    name: "files whose data is in a registry are extracted empty, sparse ones with bytes of the archive itself",
    of: |tree| {
        for (path, facts) in tree.iter_mut().filter(|(_, facts)| facts.kind == "file") {
            let sparse = path.starts_with("sparse") && !path.ends_with("behind");
            (facts.size, facts.content) = if sparse { (facts.size, None) } else { (0, Some(Digest::of(b""))) };
        }
    },
}];

const A_MODE_OF_0_IS_SHOWN_AS_644: Defect = Defect {
    name: "what nobody may read is shown with the mode 644",
    of: |tree| tree.values_mut().filter(|facts| facts.mode == 0).for_each(|facts| facts.mode = 0o644),
};

const FIFOS_HANG_IT: Defect =
    Defect { name: "fifos hang it, and are left out by us", of: |tree| tree.retain(|_, facts| facts.kind != "fifo") };

// What follows names paths of tests/images/pathological.py; where they are not, nothing changes.

const LINKS_TO_LATER_ENTRIES_ARE_LOST: Defect = Defect {
    name: "hard links to later entries are lost",
    of: |tree| {
        drop_names(tree, &["ahead/of-a-file", "ahead/of-a-chain"]);
        change(tree, "ahead/z/file", |facts| facts.nlink = 1);
    },
};

const SPARSE_FORMS: [&str; 3] = ["many", "begins", "hole"];

const OLD_SPARSE_FILES_ARE_DROPPED: Defect = Defect {
    name: "sparse files in GNU's old form are dropped",
    of: |tree| SPARSE_FORMS.iter().for_each(|form| drop_names(tree, &[&format!("sparse/gnu-{form}")])),
};

const SPARSE_FILES_ARE_TAKEN_AS_CONTIGUOUS: Defect = Defect {
    name: "sparse files are taken as contiguous: other bytes",
    of: |tree| without_content(tree, &["pax", "pax-0"]),
};

const SPARSE_FILES_FAIL: Defect =
    Defect { name: "sparse files can't be read", of: |tree| without_content(tree, &["pax", "pax-0", "gnu"]) };

fn without_content(tree: &mut Seen, kinds: &[&str]) {
    for form in SPARSE_FORMS {
        kinds.iter().for_each(|kind| change(tree, &format!("sparse/{kind}-{form}"), |facts| facts.content = None));
    }
}

const AN_OPAQUE_ROOT_HIDES_NOTHING: Defect = Defect {
    name: "an opaque mark in the root hides nothing",
    of: |tree| {
        let like = |tree: &Seen, path: &str| tree.get(Path::new(path)).cloned();
        let (Some(file), Some(dir)) = (like(tree, "before-the-mark"), like(tree, "special")) else { return };
        for (path, content) in
            [("hidden", &b"below an opaque root\n"[..]), ("hidden-too/file", b"below an opaque root, in a directory\n")]
        {
            let mut facts = file.clone();
            (facts.size, facts.content) = (content.len() as u64, Some(Digest::of(content)));
            tree.insert(path.into(), facts);
        }
        tree.insert("hidden-too".into(), dir);
    },
};

const WHITEOUTS_HIDE_THEIR_OWN_LAYER: Defect = Defect {
    name: "whiteouts and opaque marks hide what their own layer brought before them",
    of: |tree| drop_names(tree, &["siblings/replaced-before", "opaque/before"]),
};

const PARENTS_THAT_ARE_SYMLINKS_ARE_NOT_FOLLOWED: Defect =
    Defect { name: "what a layer puts below a symlink is lost", of: |tree| drop_names(tree, &["links/a-symlink"]) };

fn drop_names(tree: &mut Seen, paths: &[&str]) {
    paths.iter().for_each(|path| drop(tree.remove(Path::new(path))));
}
