//! The digest of an archive's metadata (header, index, storage info), which stands inside the index: whoever opens an archive of ours
//! knows that no bit of its names, modes and offsets has changed. The seek table has a digest of its own beside it.
//!
//! It is the text [`MARK`] and 64 hex digits, in a field of the extension; while the digest is made, zeros stand for the digits. A reader
//! finds the text by itself too, so that damage to what leads to the field does not pass for an archive without one.

use sha2::{Digest as _, Sha256};

use super::ArchiveError;
use crate::units::Digest;

/// What stands before the digits.
const MARK: &[u8] = b"clip-csi-metadata:";
/// Hex digits of a SHA-256.
const DIGITS: usize = 64;
/// The text stands within so many bytes of the index: the root node comes first in it.
const WITHIN: usize = 16 << 10;

/// The field before the digest is known.
pub(super) fn blank() -> Vec<u8> {
    [MARK, &[b'0'; DIGITS]].concat()
}

/// Where the digits stand.
fn place(index: &[u8]) -> Option<usize> {
    let head = &index[..index.len().min(WITHIN)];
    let at = head.windows(MARK.len()).position(|text| text == MARK)? + MARK.len();
    (at + DIGITS <= index.len()).then_some(at)
}

fn sum(header: &[u8], index: &[u8], storage_info: &[u8], place: Option<usize>) -> Digest {
    let mut hash = Sha256::new();
    hash.update(header);
    match place {
        None => hash.update(index),
        Some(at) => [&index[..at], &[b'0'; DIGITS], &index[at + DIGITS..]].iter().for_each(|part| hash.update(part)),
    }
    hash.update(storage_info);
    Digest(hash.finalize().into())
}

/// Puts the digest where [`blank`] stands.
pub(super) fn seal(header: &[u8], index: &mut [u8], storage_info: &[u8]) {
    if let Some(at) = place(index) {
        let digest = sum(header, index, storage_info, Some(at));
        index[at..at + DIGITS].copy_from_slice(digest.hex().as_bytes());
    }
}

/// The digest of the metadata. It is compared with the one inside, where there is one; `named`: the extension has it.
pub(super) fn check(header: &[u8], index: &[u8], storage_info: &[u8], named: bool) -> Result<Digest, ArchiveError> {
    let place = place(index);
    let digest = sum(header, index, storage_info, place);
    let says = place.map(|at| &index[at..at + DIGITS]);
    if named == says.is_some() && says.is_none_or(|says| says == digest.hex().as_bytes()) {
        return Ok(digest);
    }
    let detail = format!("its metadata has the digest {digest}, which is not the one that it was written with");
    Err(ArchiveError::Corrupt { what: "archive", detail })
}
