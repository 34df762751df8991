//! The data region of a v1 archive: one block per file, each `type byte | data | CRC-64/ISO`.

use std::os::unix::fs::FileExt;

use crc_fast::CrcAlgorithm;
use sha2::{Digest as _, Sha256};

use super::BuildError;
use super::output::Output;
use crate::archive::{BlobTable, Extent, HEADER_LEN, Span};
use crate::inflate::Indexer;
use crate::units::{Compression, Digest};

/// The block type of a file.
const FILE_BLOCK: u8 = 0;
/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;
/// A hole of at least this many bytes is left out of the file, shorter ones are not worth a write of their own.
const HOLE: u64 = 64 << 10;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Writes data blocks one after the other and collects the span table on the way. Each byte is hashed twice (its span and the region on
/// a thread of the indexer, its file here) and summed once.
pub(super) struct DataRegion<'a> {
    output: &'a Output,
    buffer: Vec<u8>,
    /// Where the next byte comes in the archive, those in the buffer counted.
    pos: u64,
    indexer: Indexer,
    content: Sha256,
    crc: crc_fast::Digest,
    /// Where the data of the open file began.
    file: u64,
    /// What of the open file is data.
    extents: Vec<Extent>,
}

/// Where a file's content went, and what it is.
#[derive(Debug, Clone)]
pub(super) struct Written {
    /// Position of the first byte; the file lies whole there, holes as zeros.
    pub offset: u64,
    /// What of it is data, where there are holes.
    pub extents: Option<Vec<Extent>>,
    /// SHA-256.
    pub digest: Digest,
}

impl<'a> DataRegion<'a> {
    /// Starts behind the header.
    pub(super) fn begin(output: &'a Output, span_size: u64) -> Self {
        Self {
            output,
            buffer: Vec::with_capacity(BUFFER),
            pos: HEADER_LEN as u64,
            indexer: Indexer::new(Compression::None, span_size),
            content: Sha256::new(),
            crc: crc_fast::Digest::new(CrcAlgorithm::Crc64GoIso),
            file: HEADER_LEN as u64,
            extents: Vec::new(),
        }
    }

    /// Begins a file's block.
    pub(super) fn begin_file(&mut self) -> Result<(), BuildError> {
        self.put(&[FILE_BLOCK])?;
        self.file = self.pos;
        Ok(())
    }

    /// The next bytes of the file.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.content.update(bytes);
        self.crc.update(bytes);
        let (offset, len) = (self.pos - self.file, bytes.len() as u64);
        match self.extents.last_mut() {
            Some(last) if last.offset + last.len == offset => last.len += len,
            _ if len == 0 => {}
            _ => self.extents.push(Extent { offset, len, blob_offset: self.pos }),
        }
        self.put(bytes)
    }

    /// The next `len` bytes of the file are zeros. Costs their hashing, no disk space where it is many of them.
    pub(super) fn hole(&mut self, mut len: u64) -> Result<(), BuildError> {
        if len < HOLE {
            return self.data(&ZEROS[..len as usize]);
        }
        self.flush()?;
        while len > 0 {
            let zeros = &ZEROS[..len.min(ZEROS.len() as u64) as usize];
            self.content.update(zeros);
            self.crc.update(zeros);
            self.index(zeros)?;
            self.pos += zeros.len() as u64;
            len -= zeros.len() as u64;
        }
        Ok(())
    }

    /// Ends the file's block.
    pub(super) fn end_file(&mut self) -> Result<Written, BuildError> {
        let crc = self.crc.finalize_reset();
        let size = self.pos - self.file;
        self.put(&crc.to_be_bytes())?;
        let extents = std::mem::take(&mut self.extents);
        let data: u64 = extents.iter().map(|extent| extent.len).sum();
        Ok(Written {
            offset: self.file,
            extents: (data < size).then_some(extents),
            digest: Digest(self.content.finalize_reset().into()),
        })
    }

    /// Ends the region: where it ends in the archive, and the span table of all that is before. The table's blob is the archive
    /// file itself from its first byte on, so that offsets in the blob are positions in the file. Its first span is the header,
    /// whose digest is not known yet (all zeros here); digest and diff ID are those of the region behind it.
    pub(super) fn finish(mut self) -> Result<(u64, BlobTable), BuildError> {
        self.flush()?;
        let header = HEADER_LEN as u64;
        let mut table = self.indexer.finish(&mut |_| {}).map_err(index_error)?;
        let starts_stream = table.spans.first().is_some_and(|span| span.starts_stream);
        for span in &mut table.spans {
            (span.uoff, span.coff, span.cend) = (span.uoff + header, span.coff + header, span.cend + header);
        }
        // Of an empty region the indexer may leave an empty span.
        table.spans.retain(|span| span.uoff < self.pos);
        let first =
            Span { uoff: 0, coff: 0, cend: header, bits: 0, starts_stream, window: (0, 0), digest: Digest([0; 32]) };
        table.spans.insert(0, first);
        (table.clen, table.ulen) = (self.pos, self.pos);
        Ok((self.pos, table))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.index(bytes)?;
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        if bytes.len() >= BUFFER {
            let output = self.output;
            output.file().write_all_at(bytes, self.pos).map_err(|error| output.error(error))?;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        self.pos += bytes.len() as u64;
        Ok(())
    }

    fn index(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.indexer.push(bytes, &mut |_| {}).map_err(index_error)
    }

    fn flush(&mut self) -> Result<(), BuildError> {
        let at = self.pos - self.buffer.len() as u64;
        self.output.file().write_all_at(&self.buffer, at).map_err(|error| self.output.error(error))?;
        self.buffer.clear();
        Ok(())
    }
}

fn index_error(error: crate::inflate::InflateError) -> BuildError {
    BuildError::Io { what: "index the data of the archive".into(), detail: error.to_string() }
}
