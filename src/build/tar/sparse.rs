//! Sparse files: GNU's own form and the three that ride on PAX.

use super::header::{BLOCK, Block, number};
use super::pax::decimal;
use super::{MAX_META, MAX_SIZE};
use crate::archive::Extent;

/// Offset and length of each piece of data, in file order.
type Map = Vec<(u64, u64)>;

/// The `GNU.sparse.*` records.
#[derive(Debug, Default)]
pub(super) struct PaxSparse {
    pub name: Option<Vec<u8>>,
    /// Bytes of the whole file.
    pub size: Option<u64>,
    version: (Option<u64>, Option<u64>),
    blocks: Option<u64>,
    /// Version 0.1's map, or the pairs of version 0.0.
    map: Option<Map>,
    /// An offset of version 0.0 that waits for its length.
    offset: Option<u64>,
}

/// Where the map of a PAX sparse file stands.
#[derive(Debug)]
pub(super) enum Form {
    /// 0.0 and 0.1.
    InHeader(Map),
    /// 1.0: in front of the data.
    InData,
}

impl PaxSparse {
    /// One record; `key` without `GNU.sparse.`.
    pub fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        if value.is_empty() {
            return Ok(());
        }
        match key {
            b"name" => self.name = Some(value.to_vec()),
            // 0.x says size, 1.0 realsize.
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"major" => self.version.0 = Some(decimal(value)?),
            b"minor" => self.version.1 = Some(decimal(value)?),
            b"numblocks" => self.blocks = Some(decimal(value)?),
            b"offset" => {
                let earlier = self.offset.replace(decimal(value)?);
                earlier.map_or(Ok(()), |_| Err("two offsets in a row".to_owned()))?;
            }
            b"numbytes" => {
                let offset = self.offset.take().ok_or("a length without its offset")?;
                self.map.get_or_insert_default().push((offset, decimal(value)?));
            }
            b"map" => {
                let numbers = value.split(|b| *b == b',').map(decimal).collect::<Result<Vec<_>, _>>()?;
                let (pairs, rest) = numbers.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err("an odd count of numbers".into());
                }
                self.map = Some(pairs.iter().map(|[offset, len]| (*offset, *len)).collect());
            }
            _ => {}
        }
        Ok(())
    }

    /// Is it sparse, and in which form?
    pub fn form(&self) -> Result<Option<Form>, String> {
        match self.version {
            (Some(1), Some(0)) => return Ok(Some(Form::InData)),
            (None, None) if self.map.is_none() && self.blocks.is_none() => return Ok(None),
            (None, None) | (Some(0), Some(0 | 1)) => {}
            (major, minor) => {
                let show = |n: Option<u64>| n.map_or("?".into(), |n| n.to_string());
                return Err(format!("sparse format {}.{} is not known", show(major), show(minor)));
            }
        }
        let map = self.map.clone().unwrap_or_default();
        if self.offset.is_some() || self.blocks.is_some_and(|n| n != map.len() as u64) {
            return Err("its sparse map does not have as many pieces as it says".into());
        }
        Ok(Some(Form::InHeader(map)))
    }
}

/// An old GNU sparse header: the file's size, the first pieces, and whether extension blocks follow.
pub(super) fn gnu_header(block: &Block) -> Result<(u64, Map, bool), String> {
    if &block[257..263] != b"ustar " {
        return Err("a sparse file (type S) in a header that is not GNU's".into());
    }
    let size = number(&block[483..495]).and_then(|n| u64::try_from(n).ok()).ok_or("its real size is not a number")?;
    let mut map = Vec::new();
    gnu_pieces(&block[386..482], &mut map)?;
    Ok((size, map, block[482] != 0))
}

/// An extension block: more pieces, and whether another block follows.
pub(super) fn gnu_extension(block: &Block, map: &mut Map) -> Result<bool, String> {
    gnu_pieces(&block[..504], map)?;
    Ok(block[504] != 0)
}

fn gnu_pieces(fields: &[u8], map: &mut Map) -> Result<(), String> {
    for piece in fields.chunks_exact(24) {
        if piece[0] == 0 {
            break;
        }
        let at = |range: std::ops::Range<usize>| number(&piece[range]).and_then(|n| u64::try_from(n).ok());
        let (offset, len) = at(0..12).zip(at(12..24)).ok_or("its sparse map is not made of numbers")?;
        map.push((offset, len));
    }
    Ok(())
}

/// The map of version 1.0: decimal numbers, a line each: the count of pieces, then offset and length of each.
#[derive(Debug, Default)]
pub(super) struct TextMap {
    held: u64,
    line: Vec<u8>,
    pieces: Option<u64>,
    offset: Option<u64>,
    map: Map,
}

impl TextMap {
    /// One more block; the map once it is whole (the rest of its last block is padding).
    pub fn push(&mut self, block: &Block) -> Result<Option<Map>, String> {
        self.held += BLOCK as u64;
        if self.held > MAX_META {
            return Err(format!("its sparse map is over {MAX_META} bytes"));
        }
        for byte in block {
            if *byte != b'\n' {
                self.line.push(*byte);
                if self.line.len() > 20 {
                    return Err("its sparse map is not made of numbers".into());
                }
                continue;
            }
            let value = decimal(&self.line)?;
            self.line.clear();
            match (self.pieces, self.offset.take()) {
                (None, _) => self.pieces = Some(value),
                (Some(_), None) => self.offset = Some(value),
                (Some(_), Some(offset)) => self.map.push((offset, value)),
            }
            if self.pieces == Some(self.map.len() as u64) && self.offset.is_none() {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}

/// Checks a map (in order, inside `size`, as much data as is `stored`) and says where each piece lies, data starting at `base`.
pub(super) fn extents(map: &[(u64, u64)], size: u64, stored: u64, base: u64) -> Result<Vec<Extent>, String> {
    if size > MAX_SIZE {
        return Err(format!("a size of {size} bytes is absurd"));
    }
    let mut out: Vec<Extent> = Vec::with_capacity(map.len());
    let (mut end, mut used) = (0, 0);
    for &(offset, len) in map {
        let past = offset.checked_add(len).filter(|past| *past <= size);
        let (Some(past), true) = (past, offset >= end) else {
            return Err("its sparse map overlaps itself or passes the end of the file".into());
        };
        match out.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.offset + last.len == offset => last.len += len,
            _ => out.push(Extent { offset, len, blob_offset: base + used }),
        }
        // Both stay below MAX_SIZE: the pieces don't overlap and end inside the file.
        used += len;
        end = past;
    }
    if used != stored {
        return Err(format!("its sparse map describes {used} bytes of data, {stored} are stored"));
    }
    Ok(out)
}
