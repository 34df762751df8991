//! eStargz: each chunk of a file is a gzip member, and the last member before the footer holds the table of contents in a tar.
//!
//! The footer is an empty gzip member, whose extra field says where that member starts: 16 hex digits and `STARGZ`, in a subfield `SG`
//! (51 bytes in all) or, of old, bare (47 bytes).
//!
//! The table says of a chunk which member it starts, not where it lies in the tar: between two chunks are padding and headers, whose
//! lengths it does not tell. It has times in whole seconds only.

use super::entries::{Chunk, Contents};
use super::{MAX_JSON, MAX_STORED, TocError, broken, check, entries};
use crate::build::tar::{TarEntry, Walker};
use crate::inflate::{InflateError, inflate_whole};
use crate::units::{Compression, Digest};

/// The layer annotation that holds the digest of the table's JSON.
pub const ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Length of the footer in bytes.
pub const FOOTER_LEN: usize = 51;
const LEGACY_LEN: usize = 47;
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
/// of its JSON.
pub fn open(member: &[u8], footer: Footer, digest: &Digest) -> Result<Contents, TocError> {
    const WHAT: &str = "the member of its table of contents";
    // A tar header before it, padding and two blocks of zeros behind it.
    let tar = inflate_whole(Compression::Gzip, member, MAX_JSON + 8192);
    let tar = tar.map_err(|error: InflateError| broken(WHAT, error.to_string()))?;
    let mut found: Vec<TarEntry> = Vec::new();
    let walked = Walker::new().push(&tar, &mut |entry| found.push(entry));
    walked.map_err(|error| broken(WHAT, error.to_string()))?;
    let json = match &found[..] {
        [one] if *one.path == *NAME && one.extents.is_none() => {
            let range = usize::try_from(one.offset).ok().zip(usize::try_from(one.size).ok());
            range.and_then(|(from, len)| tar.get(from..from.checked_add(len)?))
        }
        _ => None,
    };
    let (Some(json), Some(entry)) = (json, found.pop()) else {
        return Err(broken(WHAT, "it does not hold stargz.index.json alone"));
    };
    check("its table of contents", json, digest)?;
    let mut contents = entries::parse(json, footer.toc)?;
    if contents.lossy {
        return Err(TocError::Lacking("its table of contents can't hold a name that is not UTF-8".into()));
    }
    // The table is a file of the layer's tar like any other, as every unpacker sees.
    if entry.size > 0 {
        let chunk =
            Chunk { coff: footer.toc, cend: footer.start, skip: entry.offset, len: entry.size, digest: *digest };
        contents.push(entry, chunk);
    }
    Ok(contents)
}
