//! Writing objects: in one request where small, else in parts, each with a checksum.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::super::SourceError;
use super::super::local::{Roots, blocking};
use super::super::retry::{Failure, Label, RetryPolicy};
use super::client;

/// Up to this size an object goes in one request; above, in parts of at least this size. S3 takes 5 MiB to 5 GiB.
const PART: u64 = 16 << 20;
/// Parts that one upload may have (S3's limit is 10,000).
const MAX_PARTS: u64 = 9_000;
/// Parts in flight: with [`PART`], what an upload holds in memory.
const CONCURRENT: usize = 4;

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
            return self.in_parts(path, file, size, progress).await;
        }
        let bytes = read(path, file, 0, size).await?;
        let put = || async {
            self.client
                .put_object()
                .bucket(self.bucket)
                .key(self.key)
                .set_if_none_match(self.create_only.then(|| "*".to_owned()))
                .checksum_algorithm(ChecksumAlgorithm::Crc32)
                .body(bytes.clone().into())
                .send()
                .await
                .map_err(|e| put_failure(self.name, self.create_only, e))
        };
        self.retry.run(Label::S3, self.name, size, put).await?;
        progress(size);
        Ok(())
    }

    async fn in_parts(
        &self,
        path: &Path,
        file: Arc<File>,
        size: u64,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), SourceError> {
        let start = || async {
            self.client
                .create_multipart_upload()
                .bucket(self.bucket)
                .key(self.key)
                .checksum_algorithm(ChecksumAlgorithm::Crc32)
                .send()
                .await
                .map_err(|e| client::failure(self.name, e))
        };
        let started = self.retry.run(Label::S3, self.name, 0, start).await?;
        let id = started.upload_id().ok_or_else(|| SourceError::Corrupt {
            what: self.name.into(),
            detail: "the store began an upload without naming it".into(),
        })?;
        let done = async {
            let parts = self.send_parts(id, path, file, size, progress).await?;
            self.complete(id, parts).await
        };
        let outcome = done.await;
        if outcome.is_err() {
            // Parts that are left behind cost money until somebody finds them.
            let abort =
                self.client.abort_multipart_upload().bucket(self.bucket).key(self.key).upload_id(id).send().await;
            if let Err(error) = abort {
                let failure = client::failure(self.name, error).error();
                tracing::warn!(what = self.name, %failure, "the parts of a failed upload could not be removed");
            }
        }
        outcome
    }

    async fn send_parts(
        &self,
        id: &str,
        path: &Path,
        file: Arc<File>,
        size: u64,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Vec<CompletedPart>, SourceError> {
        let length = PART.max(size.div_ceil(MAX_PARTS));
        let mut parts: Vec<CompletedPart> = futures::stream::iter(0..size.div_ceil(length))
            .map(|i| {
                let file = file.clone();
                async move {
                    let (start, end) = (i * length, size.min((i + 1) * length));
                    let bytes = read(path, file, start, end - start).await?;
                    let number = i32::try_from(i + 1).unwrap_or(i32::MAX);
                    let send = || async {
                        self.client
                            .upload_part()
                            .bucket(self.bucket)
                            .key(self.key)
                            .upload_id(id)
                            .part_number(number)
                            .checksum_algorithm(ChecksumAlgorithm::Crc32)
                            .body(bytes.clone().into())
                            .send()
                            .await
                            .map_err(|e| client::failure(self.name, e))
                    };
                    let sent = self.retry.run(Label::S3, self.name, end - start, send).await?;
                    progress(end - start);
                    Ok::<_, SourceError>(
                        CompletedPart::builder()
                            .part_number(number)
                            .set_e_tag(sent.e_tag().map(str::to_owned))
                            .set_checksum_crc32(sent.checksum_crc32().map(str::to_owned))
                            .build(),
                    )
                }
            })
            .buffer_unordered(CONCURRENT)
            .try_collect()
            .await?;
        parts.sort_by_key(CompletedPart::part_number);
        Ok(parts)
    }

    async fn complete(&self, id: &str, parts: Vec<CompletedPart>) -> Result<(), SourceError> {
        let upload = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let complete = || async {
            self.client
                .complete_multipart_upload()
                .bucket(self.bucket)
                .key(self.key)
                .upload_id(id)
                .set_if_none_match(self.create_only.then(|| "*".to_owned()))
                .multipart_upload(upload.clone())
                .send()
                .await
                .map_err(|e| put_failure(self.name, self.create_only, e))
        };
        self.retry.run(Label::S3, self.name, 0, complete).await.map(|_| ())
    }
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
