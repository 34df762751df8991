//! zstd:chunked: each chunk of a file is a zstd frame; the table of contents, and tar-split data, lie in skippable frames at the end.
//! The layer's annotations say where, and have the table's digest (compressed as it is stored); the footer repeats it and is not read.
//!
//! Two writers, two spellings: `io.github.containers.zstd-chunked.…` (containers/storage: podman, buildah, skopeo), and
//! `io.containers.zstd-chunked.…` (stargz-snapshotter, without tar-split data).

use std::collections::BTreeMap;
use std::ops::Range;

use super::entries::{self, Contents};
use super::{MAX_JSON, MAX_STORED, TocError, broken, check, tar_split};
use crate::inflate::inflate_whole;
use crate::units::{Compression, Digest};

const PREFIXES: [&str; 2] = ["io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."];
const TABLE: &str = "its table of contents";
const TAR_SPLIT: &str = "its tar-split data";
/// A skippable frame's magic number and length, before what it holds.
const FRAME_HEAD: u64 = 8;

/// What lies in one skippable frame, its head not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the layer.
    pub offset: u64,
    /// Bytes there.
    pub stored: u64,
    /// Bytes uncompressed.
    pub plain: u64,
}

impl Piece {
    /// `offset:stored:plain[:1]`.
    fn parse(what: &'static str, text: &str, kind: bool) -> Result<Self, TocError> {
        let bad = || broken(what, format!("its position {:?} is none", text.chars().take(100).collect::<String>()));
        let number = |part: &str| part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse::<u64>().ok()).flatten();
        let parts: Option<Vec<u64>> = text.split(':').map(number).collect();
        match parts.as_deref() {
            // The one kind of table there is.
            Some(&[offset, stored, plain, 1]) if kind => Ok(Self { offset, stored, plain }),
            Some(&[offset, stored, plain]) if !kind => Ok(Self { offset, stored, plain }),
            _ => Err(bad()),
        }
    }

    fn check(&self, what: &'static str, size: u64) -> Result<(), TocError> {
        for (value, limit) in [(self.stored, MAX_STORED), (self.plain, MAX_JSON as u64)] {
            if value > limit {
                return Err(TocError::TooLarge { what, value, limit });
            }
        }
        let end = self.offset.checked_add(self.stored);
        if self.offset < FRAME_HEAD || end.is_none_or(|end| end > size) {
            return Err(broken(what, format!("{} bytes at {} of a layer of {size}", self.stored, self.offset)));
        }
        Ok(())
    }

    /// Where it lies in the layer.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.stored)
    }

    fn inflate(&self, what: &'static str, stored: &[u8]) -> Result<Vec<u8>, TocError> {
        let limit = usize::try_from(self.plain).unwrap_or(usize::MAX).min(MAX_JSON);
        let plain = inflate_whole(Compression::Zstd, stored, limit);
        let plain = plain.map_err(|error| broken(what, error.to_string()))?;
        if plain.len() as u64 != self.plain {
            return Err(broken(what, format!("it has {} bytes, {} were said", plain.len(), self.plain)));
        }
        Ok(plain)
    }
}

/// What a layer's annotations say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// The table of contents.
    pub table: Piece,
    /// Its SHA-256, as stored.
    pub digest: Digest,
    /// The tar-split data.
    pub tar_split: Option<Piece>,
    /// Its SHA-256 as stored, where it is annotated; newer writers put it into the table.
    pub tar_split_digest: Option<Digest>,
}

/// Finds the tables of a layer of `size` bytes. `None`: its annotations speak of none.
pub fn positions(annotations: &BTreeMap<String, String>, size: u64) -> Option<Result<Positions, TocError>> {
    PREFIXES.iter().find_map(|prefix| {
        let get = |name: &str| annotations.get(&format!("{prefix}{name}"));
        let (position, digest) = (get("manifest-position")?, get("manifest-checksum")?);
        Some((|| {
            let table = Piece::parse(TABLE, position, true)?;
            table.check(TABLE, size)?;
            let parse = |what, text: &String| text.parse().map_err(|_| broken(what, "its digest is none"));
            let tar_split = get("tarsplit-position").map(|text| Piece::parse(TAR_SPLIT, text, false)).transpose()?;
            if let Some(piece) = &tar_split {
                piece.check(TAR_SPLIT, size)?;
            }
            let tar_split_digest = get("tarsplit-checksum").map(|text| parse(TAR_SPLIT, text)).transpose()?;
            Ok(Positions { table, digest: parse(TABLE, digest)?, tar_split, tar_split_digest })
        })())
    })
}

/// Reads the tables: `table` and `tar_split` are the layer's bytes where [`Positions`] says that they lie. Tar-split data
/// that no digest covers is not looked at.
pub fn open(positions: &Positions, table: &[u8], tar_split: Option<&[u8]>) -> Result<Contents, TocError> {
    check(TABLE, table, &positions.digest)?;
    let json = positions.table.inflate(TABLE, table)?;
    let first = positions.tar_split.map_or(u64::MAX, |piece| piece.offset).min(positions.table.offset);
    let mut contents = entries::parse(&json, first - FRAME_HEAD)?;
    if let (Some(piece), Some(bytes), Some(digest)) =
        (positions.tar_split, tar_split, contents.tar_split.or(positions.tar_split_digest))
    {
        check(TAR_SPLIT, bytes, &digest)?;
        let lines = piece.inflate(TAR_SPLIT, bytes)?;
        tar_split::refine(&mut contents, &lines)?;
    }
    if contents.lossy {
        return Err(TocError::Lacking("its table of contents can't hold a name that is not UTF-8".into()));
    }
    Ok(contents)
}
