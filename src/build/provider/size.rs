//! How large an image is, told from its archive alone.

use super::{Provided, Provider};
use crate::archive::{self, ArchiveError, HEADER_LEN, Header};
use crate::build::BuildError;
use crate::source::Credentials;

impl Provider {
    /// The bytes of all files of an image whose archive was just provided: header and index are read, nothing else. Hard
    /// links count once, holes as if they were there.
    pub async fn content_bytes(&self, provided: &Provided) -> Result<u64, BuildError> {
        // The location is our own choice: a file of this process or an object of the configured store.
        let source = self.inner.sources.trusted().open(&provided.location, &Credentials::default()).await?;
        let size = source.stat().await?.size;
        if size < HEADER_LEN as u64 {
            return Err(ArchiveError::Truncated { what: "header", need: HEADER_LEN as u64, have: size }.into());
        }
        let first = source.read_range(0..HEADER_LEN as u64).await?;
        let header = Header::decode(&first)?;
        header.check(size)?;
        let range = |(pos, len): (u64, u64)| if len == 0 { 0..0 } else { pos..pos.saturating_add(len) };
        let index = source.read_range(range(header.index)).await?;
        let storage = match range(header.storage_info) {
            none if none.is_empty() => bytes::Bytes::new(),
            some => source.read_range(some).await?,
        };
        let decoded = tokio::task::spawn_blocking(move || archive::decode(&first, &index, &storage));
        let decoded =
            decoded.await.map_err(|e| BuildError::Io { what: "reading an index".into(), detail: e.to_string() })?;
        Ok(decoded?.tree.total_size())
    }
}
