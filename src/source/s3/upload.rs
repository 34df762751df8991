//! Writing objects: in one request where small, else in parts; each with its SHA-256, which the store compares.

mod parts;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use base64::Engine as _;
use bytes::Bytes;

use super::super::SourceError;
use super::super::local::{Roots, blocking};
use super::super::retry::{Failure, Label, RetryPolicy};
use super::client;
use crate::units::Digest;

/// Up to this size an object goes in one request; above, in parts of at least this size. S3 takes 5 MiB to 5 GiB.
const PART: u64 = 16 << 20;

/// One upload.
pub(super) struct Upload<'a> {
    pub(super) client: &'a Client,
    pub(super) bucket: &'a str,
    pub(super) key: &'a str,
    pub(super) name: &'a str,
    pub(super) create_only: bool,
    pub(super) retry: &'a RetryPolicy,
}

/// The errors of a conditional write.
fn put_failure<E>(what: &str, create_only: bool, error: SdkError<E, HttpResponse>) -> Failure
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let status = error.raw_response().map(|r| r.status().as_u16());
    let exists = || SourceError::Exists { what: what.into() };
    match status {
        Some(412) if create_only => exists().into(),
        // Another write of the key is under way: the next try finds out which of them won.
        Some(409) if create_only => Failure::Again(exists(), None),
        Some(501) if create_only => {
            let detail = "the store does not know If-None-Match, which creating without overwriting needs".into();
            SourceError::Invalid { what: what.into(), detail }.into()
        }
        _ => client::failure(what, error),
    }
}

impl Upload<'_> {
    pub(super) async fn run(&self, path: &Path, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<(), SourceError> {
        let owned = path.to_owned();
        let file = blocking(self.name, move || Roots::any().open(&owned)).await?;
        let size = file.metadata().map_err(|e| SourceError::of_io(path.display(), &e))?.len();
        let file = Arc::new(file);
        if size > PART {
            return parts::upload(self, path, file, size, progress).await;
        }
        let bytes = read(path, file, 0, size).await?;
        let checksum = checksum(&bytes);
        let tries = AtomicU32::new(0);
        let put = || async {
            tries.fetch_add(1, Ordering::Relaxed);
            self.client
                .put_object()
                .bucket(self.bucket)
                .key(self.key)
                .set_if_none_match(self.create_only.then(|| "*".to_owned()))
                .checksum_algorithm(ChecksumAlgorithm::Sha256)
                .checksum_sha256(&checksum)
                .body(bytes.clone().into())
                .send()
                .await
                .map_err(|e| put_failure(self.name, self.create_only, e))
        };
        match self.retry.run(Label::S3, self.name, size, put).await {
            Ok(_) => {}
            // The answer to an earlier try was lost, not the object.
            Err(SourceError::Exists { .. }) if tries.into_inner() > 1 && self.has_arrived(size, &checksum).await => {}
            Err(error) => return Err(error),
        }
        progress(size);
        Ok(())
    }

    /// Whether the object is the one that was sent. A store that keeps no checksums can't tell.
    async fn has_arrived(&self, size: u64, checksum: &str) -> bool {
        let head = self.client.head_object().bucket(self.bucket).key(self.key).checksum_mode(ChecksumMode::Enabled);
        match head.send().await {
            Ok(there) => {
                there.content_length() == i64::try_from(size).ok() && there.checksum_sha256() == Some(checksum)
            }
            Err(error) => {
                let failure = client::failure(self.name, error).error();
                tracing::debug!(what = self.name, %failure, "can't tell whether it has arrived");
                false
            }
        }
    }
}

/// SHA-256 as S3 writes it.
fn checksum(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(Digest::of(bytes).0)
}

async fn read(path: &Path, file: Arc<File>, start: u64, len: u64) -> Result<Bytes, SourceError> {
    let what = path.display().to_string();
    let name = what.clone();
    blocking(&name, move || {
        let mut buf = vec![0; len as usize];
        file.read_exact_at(&mut buf, start).map_err(|e| SourceError::of_io(&what, &e))?;
        Ok(buf.into())
    })
    .await
}
