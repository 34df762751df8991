//! A tar walker: uncompressed bytes are pushed in, entries come out, file data is stepped over.
//!
//! It says of each entry where its data lies in the stream and keeps none of it: what is held are headers, PAX records,
//! long names and sparse maps, each under a limit. Understood are V7, ustar, star, old GNU and PAX headers, base-256 numbers, GNU
//! long names, all four forms of sparse files and both forms of extended attributes.
//!
//! Where the formats leave room, it does what Go's `archive/tar` does, because that is what unpacks images everywhere else: global PAX
//! headers have no effect, links and devices have no data whatever their size field says, a zero block
//! ends the archive only when a second one (or the end of the stream) follows. Names are taken as an unpacker rooted at `/`
//! takes them, with one difference: a name that leads above the root is refused, not clamped.

mod header;
mod pax;
mod sparse;

use crate::archive::{Extent, Timestamp};
pub(super) use header::device;
use header::{BLOCK, Block, Raw};
use pax::Pax;

/// Largest PAX header, GNU long name or sparse map in bytes; the limit of Go's `archive/tar`.
const MAX_META: u64 = 1 << 20;
/// Largest size of one file: what a signed 64-bit offset holds, with room for additions.
const MAX_SIZE: u64 = 1 << 62;
/// Linux' `PATH_MAX` without its NUL.
pub(super) const MAX_PATH: usize = 4095;
/// Linux' `NAME_MAX`.
pub(super) const MAX_NAME: usize = 255;
/// Entries of one layer. The largest images in use have about a tenth of it.
const MAX_ENTRIES: u64 = 2_000_000;
/// Names, link targets, attributes and sparse maps of one layer, in bytes.
const MAX_HELD: u64 = 256 << 20;

/// What a tar entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EntryKind {
    File,
    Dir,
    Symlink,
    HardLink,
    Fifo,
    CharDevice,
    BlockDevice,
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Cleaned, without a leading slash; empty: the root.
    pub path: Box<[u8]>,
    /// What it makes.
    pub kind: EntryKind,
    /// `0o7777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification.
    pub mtime: Timestamp,
    /// Access; the modification time where the header has none.
    pub atime: Timestamp,
    /// Change; the modification time where the header has none.
    pub ctime: Timestamp,
    /// Linux `dev_t` of a device.
    pub rdev: u32,
    /// Symlink: the target as written. Hard link: the cleaned path of the file. Else empty.
    pub link: Box<[u8]>,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of a regular file, holes included.
    pub size: u64,
    /// Where a regular file's data begins in the stream.
    pub offset: u64,
    /// The pieces of a sparse file that hold data.
    pub extents: Option<Vec<Extent>>,
}

impl TarEntry {
    /// Bytes of its names, attributes and sparse map.
    pub(super) fn held(&self) -> u64 {
        let xattrs: usize = self.xattrs.iter().map(|(n, v)| n.len() + v.len() + 48).sum();
        let extents = self.extents.as_ref().map_or(0, |e| e.len() * size_of::<Extent>());
        (self.path.len() + self.link.len() + xattrs + extents) as u64
    }
}

/// A tar stream that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tar header at uncompressed byte {at}{}: {detail}", .name.as_ref().map(|n| format!(" ({n})")).unwrap_or_default())]
pub struct TarError {
    /// Offset of the header in the stream.
    pub at: u64,
    /// The entry's name, where it is known, made printable.
    pub name: Option<String>,
    /// What is wrong.
    pub detail: String,
}

/// A name for a message: printable, at most 200 characters.
pub(super) fn show(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let text = text.trim_end_matches('\0');
    let mut out: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.chars().nth(200).is_some() {
        out.push('…');
    }
    out
}

/// Cleans a path as `/` + path would be: no empty, `.` or `..` components, no slash in front. `Err` says what is wrong.
pub(super) fn clean(name: &[u8]) -> Result<Box<[u8]>, String> {
    if name.contains(&0) {
        return Err("the name holds a NUL byte".into());
    }
    let mut out: Vec<u8> = Vec::with_capacity(name.len());
    for part in name.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if out.is_empty() {
                    return Err("the name leads above the root of the image".into());
                }
                let cut = out.iter().rposition(|b| *b == b'/').unwrap_or(0);
                out.truncate(cut);
            }
            _ if part.len() > MAX_NAME => return Err(format!("a component of the name is over {MAX_NAME} bytes")),
            _ => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(part);
            }
        }
    }
    if out.len() > MAX_PATH {
        return Err(format!("the name is over {MAX_PATH} bytes"));
    }
    Ok(out.into_boxed_slice())
}

/// What the next bytes are.
#[derive(Debug)]
enum State {
    /// A header.
    Header,
    /// A header, or the second of two zero blocks.
    HalfEnd,
    /// Blocks of a PAX header or a GNU long name of `size` bytes.
    Meta { kind: u8, size: usize, held: Vec<u8> },
    /// Blocks of an old GNU sparse map.
    GnuMap { entry: Box<TarEntry>, stored: u64, map: Vec<(u64, u64)>, held: u64 },
    /// Blocks of a PAX 1.0 sparse map, the first of the entry's data.
    PaxMap { entry: Box<TarEntry>, stored: u64, map: sparse::TextMap },
    /// Data, then padding, that nobody looks at.
    Skip { data: u64, padding: u64 },
    /// Past the end: padding of any length.
    End,
}

/// The walker. Memory: the limits above and one entry.
#[derive(Debug)]
pub struct Walker {
    state: State,
    /// Bytes consumed.
    pos: u64,
    /// A block that came in pieces.
    partial: Block,
    filled: usize,
    pax: Pax,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    entries: u64,
    held: u64,
}

impl Default for Walker {
    fn default() -> Self {
        Self {
            state: State::Header,
            pos: 0,
            partial: [0; BLOCK],
            filled: 0,
            pax: Pax::default(),
            long_name: None,
            long_link: None,
            entries: 0,
            held: 0,
        }
    }
}

impl Walker {
    /// A walker at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream, in pieces of any size; `sink` gets each entry once its header is read, before its
    /// data. After an error the walker is not to be used again.
    pub fn push(&mut self, mut input: &[u8], sink: &mut dyn FnMut(TarEntry)) -> Result<(), TarError> {
        while !input.is_empty() {
            match &mut self.state {
                State::Skip { data, padding } => {
                    let left = *data + *padding;
                    let n = left.min(input.len() as u64);
                    let of_data = n.min(*data);
                    *data -= of_data;
                    *padding -= n - of_data;
                    if n == left {
                        self.state = State::Header;
                    }
                    self.pos += n;
                    input = &input[n as usize..];
                }
                State::End => {
                    self.pos += input.len() as u64;
                    return Ok(());
                }
                _ => {
                    let n = (BLOCK - self.filled).min(input.len());
                    self.partial[self.filled..self.filled + n].copy_from_slice(&input[..n]);
                    self.filled += n;
                    self.pos += n as u64;
                    input = &input[n..];
                    if self.filled == BLOCK {
                        self.filled = 0;
                        let block = self.partial;
                        let state = std::mem::replace(&mut self.state, State::End);
                        self.state = self.block(state, &block, sink)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Steps over the data of the entry that came last without seeing it; its padding comes next. `false`: `len` bytes of data are
    /// not what comes next, or no tar is that long.
    pub(super) fn pass_data(&mut self, len: u64) -> bool {
        let end = self.pos.saturating_add(len);
        match &mut self.state {
            State::Skip { data, .. } if *data == len && len > 0 && end <= MAX_SIZE => {
                (*data, self.pos) = (0, end);
                true
            }
            _ => false,
        }
    }

    /// The closing blocks have come: whatever follows is no part of the archive.
    pub(super) fn has_ended(&self) -> bool {
        matches!(self.state, State::End)
    }

    /// The stream has ended: is the archive whole? As in Go, the closing zero blocks and the last padding may be missing.
    pub fn finish(self) -> Result<(), TarError> {
        let detail = match &self.state {
            State::Header | State::HalfEnd if self.filled == 0 => return Ok(()),
            State::End | State::Skip { data: 0, .. } => return Ok(()),
            State::Header | State::HalfEnd => "the layer ends inside a tar header".into(),
            State::Skip { data, .. } => format!("the layer ends {data} bytes before the end of a file"),
            _ => "the layer ends inside an extended header".into(),
        };
        Err(TarError { at: self.pos, name: None, detail })
    }

    fn fail(&self, name: Option<&[u8]>, detail: impl Into<String>) -> TarError {
        TarError { at: self.pos.saturating_sub(BLOCK as u64), name: name.map(show), detail: detail.into() }
    }

    /// One whole block in a state that takes blocks.
    fn block(&mut self, state: State, block: &Block, sink: &mut dyn FnMut(TarEntry)) -> Result<State, TarError> {
        match state {
            State::Header if block.iter().all(|b| *b == 0) => Ok(State::HalfEnd),
            State::HalfEnd if block.iter().all(|b| *b == 0) => Ok(State::End),
            State::HalfEnd => Err(self.fail(None, "a single zero block stands between two entries")),
            State::Header => self.header(block, sink),
            State::Meta { kind, size, mut held } => {
                held.extend_from_slice(block);
                if held.len() < size {
                    return Ok(State::Meta { kind, size, held });
                }
                held.truncate(size);
                self.meta(kind, held)
            }
            State::GnuMap { entry, stored, mut map, mut held } => {
                held += BLOCK as u64;
                if held > MAX_META {
                    return Err(self.fail(Some(&entry.path), format!("its sparse map is over {MAX_META} bytes")));
                }
                let more = sparse::gnu_extension(block, &mut map).map_err(|d| self.fail(Some(&entry.path), d))?;
                if more {
                    return Ok(State::GnuMap { entry, stored, map, held });
                }
                self.sparse_file(*entry, stored, map, sink)
            }
            State::PaxMap { entry, stored, mut map } => {
                if stored < BLOCK as u64 {
                    return Err(self.fail(Some(&entry.path), "its sparse map is longer than its data"));
                }
                let stored = stored - BLOCK as u64;
                match map.push(block).map_err(|d| self.fail(Some(&entry.path), d))? {
                    None => Ok(State::PaxMap { entry, stored, map }),
                    Some(map) => self.sparse_file(*entry, stored, map, sink),
                }
            }
            // Not reached: `push` hands no block to them.
            State::Skip { .. } | State::End => Ok(state),
        }
    }

    fn meta(&mut self, kind: u8, held: Vec<u8>) -> Result<State, TarError> {
        let text = |mut held: Vec<u8>| {
            held.truncate(held.iter().position(|b| *b == 0).unwrap_or(held.len()));
            Some(held).filter(|h| !h.is_empty())
        };
        match kind {
            b'L' => self.long_name = text(held),
            b'K' => self.long_link = text(held),
            _ => self.pax = Pax::parse(&held).map_err(|d| self.fail(None, d))?,
        }
        Ok(State::Header)
    }

    fn header(&mut self, block: &Block, sink: &mut dyn FnMut(TarEntry)) -> Result<State, TarError> {
        let raw = Raw::parse(block).map_err(|d| self.fail(None, d))?;
        match raw.kind {
            b'x' | b'L' | b'K' => {
                if raw.size > MAX_META {
                    return Err(self.fail(Some(&raw.name), format!("an extended header of over {MAX_META} bytes")));
                }
                let size = raw.size as usize;
                if size == 0 {
                    return self.meta(raw.kind, Vec::new());
                }
                // Grown as the bytes arrive: a header alone makes us hold nothing.
                Ok(State::Meta { kind: raw.kind, size, held: Vec::new() })
            }
            b'g' => Ok(skip(raw.size)),
            _ => self.entry(raw, block, sink),
        }
    }

    fn entry(&mut self, raw: Raw, block: &Block, sink: &mut dyn FnMut(TarEntry)) -> Result<State, TarError> {
        let pax = std::mem::take(&mut self.pax);
        let long_name = self.long_name.take();
        let long_link = self.long_link.take();
        let mut name = long_name.or(pax.path).unwrap_or(raw.name);
        if let Some(sparse_name) = pax.sparse.name.clone() {
            name = sparse_name;
        }
        let fail = |detail: String| self.fail(Some(&name), detail);

        let kind = match raw.kind {
            0 if name.ends_with(b"/") => EntryKind::Dir,
            0 | b'0' | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            other => {
                let detail = format!("entries of type {:?} are not known to image unpackers", char::from(other));
                return Err(fail(detail));
            }
        };
        let stored = if kind == EntryKind::File { pax.size.unwrap_or(raw.size) } else { 0 };
        if stored > MAX_SIZE {
            return Err(fail(format!("a size of {stored} bytes is absurd")));
        }
        let path = clean(&name).map_err(&fail)?;
        let written = long_link.or(pax.link).unwrap_or(raw.link);
        let link = match kind {
            EntryKind::HardLink => {
                clean(&written).map_err(|d| fail(format!("hard link to {}: {d}", show(&written))))?
            }
            EntryKind::Symlink => {
                if written.is_empty() || written.len() > MAX_PATH || written.contains(&0) {
                    return Err(fail(format!("a symlink's target must have 1 to {MAX_PATH} bytes, none of them NUL")));
                }
                written.into_boxed_slice()
            }
            _ => Box::default(),
        };
        let device = matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice);
        let rdev = if device { header::device(raw.major, raw.minor).map_err(&fail)? } else { 0 };
        let id = |what: &str, value: i64| {
            u32::try_from(value).map_err(|_| fail(format!("{what} {value} is not a 32-bit number")))
        };
        let mtime = pax.mtime.unwrap_or(raw.mtime);
        let entry = TarEntry {
            kind,
            mode: (raw.mode & 0o7777) as u16,
            uid: id("owner", pax.uid.unwrap_or(raw.uid))?,
            gid: id("group", pax.gid.unwrap_or(raw.gid))?,
            mtime,
            atime: pax.atime.or(raw.atime).unwrap_or(mtime),
            ctime: pax.ctime.or(raw.ctime).unwrap_or(mtime),
            rdev,
            link,
            xattrs: pax.xattrs,
            size: stored,
            offset: self.pos,
            extents: None,
            path,
        };

        if raw.kind == b'S' {
            let (size, map, more) = sparse::gnu_header(block).map_err(&fail)?;
            let entry = TarEntry { size, ..entry };
            if more {
                return Ok(State::GnuMap { entry: Box::new(entry), stored, map, held: 0 });
            }
            return self.sparse_file(entry, stored, map, sink);
        }
        match pax.sparse.form().map_err(&fail)? {
            None => {
                self.emit(entry, sink)?;
                Ok(skip(stored))
            }
            Some(_) if kind != EntryKind::File => Err(fail("only a file can be sparse".into())),
            Some(sparse::Form::InHeader(map)) => {
                let size = pax.sparse.size.unwrap_or(stored);
                self.sparse_file(TarEntry { size, ..entry }, stored, map, sink)
            }
            Some(sparse::Form::InData) => {
                let size = pax.sparse.size.unwrap_or(stored);
                let entry = Box::new(TarEntry { size, ..entry });
                Ok(State::PaxMap { entry, stored, map: sparse::TextMap::default() })
            }
        }
    }

    /// `stored` bytes of data follow at the current position, laid out by `map`.
    fn sparse_file(
        &mut self,
        mut entry: TarEntry,
        stored: u64,
        map: Vec<(u64, u64)>,
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<State, TarError> {
        entry.offset = self.pos;
        let extents =
            sparse::extents(&map, entry.size, stored, self.pos).map_err(|d| self.fail(Some(&entry.path), d))?;
        // A map without holes is an ordinary file.
        let whole = matches!(extents.as_slice(), [one] if one.len == entry.size);
        if !whole && entry.size > 0 {
            entry.extents = Some(extents);
        }
        self.emit(entry, sink)?;
        Ok(skip(stored))
    }

    fn emit(&mut self, entry: TarEntry, sink: &mut dyn FnMut(TarEntry)) -> Result<(), TarError> {
        self.entries += 1;
        self.held += entry.held();
        if self.entries > MAX_ENTRIES {
            return Err(self.fail(Some(&entry.path), format!("the layer has over {MAX_ENTRIES} entries")));
        }
        if self.held > MAX_HELD {
            return Err(self.fail(Some(&entry.path), format!("the layer has over {MAX_HELD} bytes of metadata")));
        }
        sink(entry);
        Ok(())
    }
}

/// Steps over `size` bytes of data and their padding.
fn skip(size: u64) -> State {
    if size == 0 {
        return State::Header;
    }
    State::Skip { data: size, padding: size.wrapping_neg() % BLOCK as u64 }
}

#[cfg(test)]
mod tests;
