//! The merge rules once more, on a plain map of paths: slow, short, and without links.

use std::collections::BTreeMap;

use super::merge::Names;
use crate::archive::Kind;
use crate::build::tar::{EntryKind, TarEntry};

/// Kind, mode, owner, time and offset: enough to tell two entries apart.
pub type What = (Kind, u16, u32, i64, u64);
/// By path; the root is empty.
pub type Model = BTreeMap<Vec<u8>, What>;

/// Whether the model knows all that these layers use.
pub fn knows(layers: &[Vec<TarEntry>]) -> bool {
    layers.iter().flatten().all(|entry| !matches!(entry.kind, EntryKind::Symlink | EntryKind::HardLink))
}

/// What a merger gave, as the model says it.
pub fn of(names: &Names) -> Model {
    let what = |entry: &crate::archive::Entry| (entry.kind, entry.mode, entry.uid, entry.mtime.sec, entry.offset);
    let path = |path: &[u8]| if path == b"/" { Vec::new() } else { path[1..].to_vec() };
    names.iter().map(|(name, entry)| (path(name), what(entry))).collect()
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.iter().rposition(|b| *b == b'/').map_or((b"", path), |at| (&path[..at], &path[at + 1..]))
}

fn is_below(path: &[u8], dir: &[u8]) -> bool {
    if dir.is_empty() {
        !path.is_empty()
    } else {
        path.len() > dir.len() && path.starts_with(dir) && path[dir.len()] == b'/'
    }
}

/// The merged tree; `None` where a layer contradicts itself.
pub fn merge(layers: &[Vec<TarEntry>]) -> Option<Model> {
    let mut tree = Model::from([(Vec::new(), (Kind::Dir, 0o755, 0, 0, 0))]);
    for layer in layers {
        let mut own = Vec::new();
        let mut entries = Vec::new();
        for entry in layer {
            let (parent, name) = split(&entry.path);
            if name == b".wh..wh..opq" {
                tree.retain(|path, _| !is_below(path, parent));
            } else if entry.path.starts_with(b".wh..wh.") {
                entries.push(entry);
            } else if parent.split(|b| *b == b'/').any(|part| part.starts_with(b".wh.")) {
                return None;
            } else if let Some(hidden) = name.strip_prefix(b".wh.") {
                if matches!(hidden, b"" | b"." | b"..") {
                    return None;
                }
                let hidden = if parent.is_empty() { hidden.to_vec() } else { [parent, b"/", hidden].concat() };
                tree.retain(|path, _| path != &hidden && !is_below(path, &hidden));
            } else {
                entries.push(entry);
            }
        }
        for entry in entries {
            place(&mut tree, &mut own, entry)?;
        }
        tree.retain(|path, _| !path.starts_with(b".wh..wh."));
    }
    Some(tree)
}

/// Places an entry; `own`: the paths of its layer so far.
fn place(tree: &mut Model, own: &mut Vec<Vec<u8>>, entry: &TarEntry) -> Option<()> {
    let path = entry.path.to_vec();
    let kind = match entry.kind {
        EntryKind::Dir => Kind::Dir,
        EntryKind::Fifo => Kind::Fifo,
        EntryKind::CharDevice => Kind::CharDevice,
        EntryKind::BlockDevice => Kind::BlockDevice,
        _ => Kind::File,
    };
    let what = (kind, entry.mode, entry.uid, entry.mtime.sec, entry.offset);
    if path.is_empty() {
        tree.insert(path, what);
        return (kind == Kind::Dir).then_some(());
    }
    for at in (0..path.len()).filter(|at| path[*at] == b'/') {
        let above = &path[..at];
        if tree.get(above).is_some_and(|what| what.0 == Kind::Dir) {
            continue;
        }
        if tree.contains_key(above) && own.iter().any(|path| path == above) {
            return None;
        }
        tree.insert(above.to_vec(), (Kind::Dir, 0o755, 0, entry.mtime.sec, 0));
        own.push(above.to_vec());
    }
    if !(kind == Kind::Dir && tree.get(&path).is_some_and(|what| what.0 == Kind::Dir)) {
        tree.retain(|other, _| !is_below(other, &path));
    }
    tree.insert(path.clone(), what);
    own.push(path);
    Some(())
}
