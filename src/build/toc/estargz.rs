//! eStargz: each chunk of a file is a gzip member, and the last member before the footer holds the table of contents in a tar.
//!
//! The footer is an empty gzip member, whose extra field says where that member starts: 16 hex digits and `STARGZ`, in a subfield `SG`
//! (51 bytes in all) or, of old, bare (47 bytes).
//!
//! Whether an unpacker sees the table as a file depends on the writer: a tar that was taken over as it is ends, with its zeros, before the
//! table comes, and whatever follows is no part of it ([`is_in_the_tar`]).
//!
//! The table says of a chunk which member it starts, not where it lies in the tar: between two chunks are padding and headers, whose
//! lengths it does not tell. It has times in whole seconds only.

use std::ops::Range;

use super::entries::{Chunk, Contents};
use super::{MAX_JSON, MAX_STORED, TocError, broken, check, entries};
use crate::build::tar::{EntryKind, TarEntry, Walker};
use crate::inflate::{InflateError, MAX_SPAN, inflate_whole};
use crate::units::{Compression, Digest};

/// The layer annotation that holds the digest of the table's JSON.
pub const ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Length of the footer in bytes.
pub const FOOTER_LEN: usize = 51;
const LEGACY_LEN: usize = 47;
/// Most bytes of the last stream, uncompressed: a chunk, what comes before it, and as much behind.
const MAX_TAIL: usize = 3 * MAX_SPAN as usize;
/// The table's name in its tar.
const NAME: &[u8] = b"stargz.index.json";
const WHAT: &str = "its eStargz footer";

/// What the end of a layer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Where the member with the table starts in the layer.
    pub toc: u64,
    /// Where the footer starts.
    pub start: u64,
}

/// Reads the footer out of the last bytes of a layer of `size` bytes; more than [`FOOTER_LEN`] are fine.
pub fn footer(tail: &[u8], size: u64) -> Result<Footer, TocError> {
    let at = |len: usize, from: usize, sign: &[u8]| {
        let footer = tail.get(tail.len().checked_sub(len)?..)?;
        // Deflate, FEXTRA and nothing else; time, flags and system are the writer's choice.
        let head = footer.starts_with(&[0x1f, 0x8b, 8, 4]) && footer.get(10..from)? == sign;
        let (digits, magic) = footer.get(from..from + 22)?.split_at(16);
        (head && magic == b"STARGZ" && digits.iter().all(u8::is_ascii_hexdigit)).then_some((len, digits))
    };
    let found = at(FOOTER_LEN, 16, b"\x1a\0SG\x16\0").or_else(|| at(LEGACY_LEN, 12, b"\x16\0"));
    let (len, digits) = found.ok_or_else(|| broken(WHAT, "the layer does not end with one"))?;
    let toc = std::str::from_utf8(digits).ok().and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let start = size.checked_sub(len as u64);
    match (toc, start) {
        (Some(toc), Some(start)) if toc > 0 && toc < start && start - toc <= MAX_STORED => Ok(Footer { toc, start }),
        (Some(toc), Some(start)) if toc > 0 && toc < start => Err(TocError::TooLarge {
            what: "its table of contents, compressed,",
            value: start - toc,
            limit: MAX_STORED,
        }),
        _ => Err(broken(WHAT, format!("it points to {}, outside of the layer", String::from_utf8_lossy(digits)))),
    }
}

/// Reads the table out of its member, the layer's bytes from [`Footer::toc`] to [`Footer::start`]. `digest` is what the manifest says
/// of its JSON. Gives what the table says, and the table itself as a file of the layer.
pub fn open(member: &[u8], footer: Footer, digest: &Digest) -> Result<(Contents, (TarEntry, Chunk)), TocError> {
    const WHAT: &str = "the member of its table of contents";
    // A tar header before it, padding and two blocks of zeros behind it.
    let tar = inflate_whole(Compression::Gzip, member, MAX_JSON + 8192);
    let tar = tar.map_err(|error: InflateError| broken(WHAT, error.to_string()))?;
    let mut found: Vec<TarEntry> = Vec::new();
    let walked = Walker::new().push(&tar, &mut |entry| found.push(entry));
    walked.map_err(|error| broken(WHAT, error.to_string()))?;
    let json = match &found[..] {
        [one] if *one.path == *NAME && one.extents.is_none() && one.size > 0 => {
            let range = usize::try_from(one.offset).ok().zip(usize::try_from(one.size).ok());
            range.and_then(|(from, len)| tar.get(from..from.checked_add(len)?))
        }
        _ => None,
    };
    let (Some(json), Some(entry)) = (json, found.pop()) else {
        return Err(broken(WHAT, "it does not hold stargz.index.json alone"));
    };
    check("its table of contents", json, digest)?;
    let contents = entries::parse(json, footer.toc)?;
    if contents.lossy {
        return Err(TocError::Lacking("its table of contents can't hold a name that is not UTF-8".into()));
    }
    let chunk = Chunk { coff: footer.toc, cend: footer.start, skip: entry.offset, len: entry.size, digest: *digest };
    Ok((contents, (entry, chunk)))
}

/// The last stream of data before the table: what [`is_in_the_tar`] needs. All of the layer before the table if it has no data.
pub fn last_stream(contents: &Contents, footer: Footer) -> Result<Range<u64>, TocError> {
    let start = contents.chunks.last().map_or(0, |chunk| chunk.coff);
    if footer.toc.saturating_sub(start) > MAX_STORED {
        let value = footer.toc.saturating_sub(start);
        return Err(TocError::TooLarge { what: "the last chunk, compressed,", value, limit: MAX_STORED });
    }
    Ok(start..footer.toc)
}

/// Whether the tar goes on up to the table, so that unpackers see the table as a file; else the tar has ended before it. `stream`: the
/// layer's bytes of [`last_stream`]. No digest covers the bytes between the last chunk and the table; all that they decide is this.
pub fn is_in_the_tar(contents: &Contents, stream: &[u8]) -> Result<bool, TocError> {
    const WHAT: &str = "the end of its tar";
    let plain = inflate_whole(Compression::Gzip, stream, MAX_TAIL);
    let plain = plain.map_err(|error: InflateError| broken(WHAT, error.to_string()))?;
    let data = contents.chunks.last().map_or(0, |chunk| chunk.skip + chunk.len);
    let last = contents.entries.iter().rfind(|entry| entry.kind == EntryKind::File && entry.size > 0);
    let padding = last.map_or(0, |entry| entry.size.wrapping_neg() % 512);
    let rest = usize::try_from(data + padding).ok().and_then(|at| plain.get(at..));
    let rest = rest.ok_or_else(|| broken(WHAT, "the last chunk is shorter than its table says"))?;
    let mut walker = Walker::new();
    walker.push(rest, &mut |_| {}).map_err(|error| broken(WHAT, error.to_string()))?;
    Ok(!walker.has_ended())
}
