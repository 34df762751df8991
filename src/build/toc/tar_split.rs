//! tar-split: the bytes of a tar that are no file's data. With them in place of the data's neighbours the walker sees each header as
//! it is, which says more than a table of contents (fractions of times, names of any bytes).
//!
//! One JSON object after the other: `{"type": 2, "payload": base64}` are raw bytes, `{"type": 1, "name": …, "size": n}` stands for
//! the data of the file whose header came last.

use std::borrow::Cow;

use base64::Engine as _;
use serde::Deserialize;

use super::entries::Contents;
use super::{MAX_JSON, TocError, broken};
use crate::build::tar::{EntryKind, TarEntry, Walker};

const WHAT: &str = "its tar-split data";

#[derive(Debug, Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: i64,
    #[serde(default)]
    size: i64,
    #[serde(default, borrow)]
    payload: Option<Cow<'a, str>>,
}

/// The entries of the tar that `lines` describe; `offset`s are those in the tar. Memory: the entries and one segment.
pub fn parse(lines: &[u8]) -> Result<Vec<TarEntry>, TocError> {
    if lines.len() > MAX_JSON {
        return Err(TocError::TooLarge { what: WHAT, value: lines.len() as u64, limit: MAX_JSON as u64 });
    }
    let mut walker = Walker::new();
    let mut entries: Vec<TarEntry> = Vec::new();
    // Entries with data, and those whose data was passed over.
    let (mut files, mut passed) = (0_u64, 0_u64);
    for line in serde_json::Deserializer::from_slice(lines).into_iter::<Line<'_>>() {
        let line = line.map_err(|error| broken(WHAT, error.to_string()))?;
        match line.kind {
            1 if line.size == 0 => {}
            1 => {
                let fits = u64::try_from(line.size).is_ok_and(|size| walker.pass_data(size));
                if !fits {
                    return Err(broken(WHAT, format!("{} bytes of a file where its tar has none", line.size)));
                }
                passed += 1;
            }
            2 => {
                let bytes =
                    base64::engine::general_purpose::STANDARD.decode(line.payload.as_deref().unwrap_or_default());
                let bytes = bytes.map_err(|_| broken(WHAT, "a segment is not base64"))?;
                let pushed = walker.push(&bytes, &mut |entry| {
                    files += u64::from(entry.kind == EntryKind::File && entry.size > 0);
                    entries.push(entry);
                });
                pushed.map_err(|error| broken(WHAT, error.to_string()))?;
            }
            other => return Err(broken(WHAT, format!("a record of type {other}"))),
        }
    }
    walker.finish().map_err(|error| broken(WHAT, error.to_string()))?;
    if files != passed {
        return Err(broken(WHAT, format!("it leaves out the data of {passed} files of {files}")));
    }
    Ok(entries)
}

/// Puts the tar's own entries in place of those of the table of contents, which must be the same in order, kind, name and size.
pub fn refine(contents: &mut Contents, lines: &[u8]) -> Result<(), TocError> {
    let mut entries = parse(lines)?;
    if entries.len() != contents.entries.len() {
        let (split, toc) = (entries.len(), contents.entries.len());
        return Err(broken(WHAT, format!("it has {split} entries, the table of contents {toc}")));
    }
    for (entry, listed) in entries.iter_mut().zip(&contents.entries) {
        if entry.extents.is_some() {
            return Err(TocError::Lacking("chunks of sparse files are not told apart from holes".into()));
        }
        let same = (entry.kind, entry.size) == (listed.kind, listed.size);
        if !same || (!contents.lossy && (&entry.path, &entry.link) != (&listed.path, &listed.link)) {
            let names = [entry, listed].map(|e| crate::build::tar::show(&e.path));
            return Err(broken(WHAT, format!("{} where the table of contents has {}", names[0], names[1])));
        }
        entry.offset = listed.offset;
    }
    contents.entries = entries;
    contents.lossy = false;
    Ok(())
}
