//! Uploads in parts, which another try, also one of another process, takes up where they broke off.
//!
//! The store is asked for unfinished uploads of the key. One whose every part has the SHA-256 of ours is taken up; any
//! other is somebody else's, and left alone until it is so old that nobody can be at it any more.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use base64::Engine as _;
use futures::{StreamExt, TryStreamExt};

use super::super::super::SourceError;
use super::super::super::retry::{Label, RetryPolicy};
use super::super::client;
use super::{PART, Upload, checksum, put_failure, read};
use crate::units::Digest;

/// Parts that one upload may have (S3's limit is 10,000).
const MAX_PARTS: u64 = 9_000;
/// Parts in flight: with [`PART`], what an upload holds in memory.
const CONCURRENT: usize = 4;
/// Unfinished uploads of one key that are looked at, newest first.
const MAX_UNFINISHED: usize = 8;
/// An unfinished upload of the key that is older than this is removed: its parts cost money.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Time for one try to have the parts put together: S3 documents minutes, in which it sends blanks.
const COMPLETION: Duration = Duration::from_secs(600);

/// A part that the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stored {
    size: u64,
    checksum: String,
    etag: Option<String>,
}

/// The file, cut.
struct Cut<'a> {
    path: &'a Path,
    file: Arc<File>,
    size: u64,
    /// Bytes per part, the last one excepted.
    length: u64,
}

impl Cut<'_> {
    fn parts(&self) -> u64 {
        self.size.div_ceil(self.length)
    }

    /// First byte and length of part `i`, from 0.
    fn range(&self, i: u64) -> (u64, u64) {
        let start = i * self.length;
        (start, self.length.min(self.size - start))
    }

    async fn read(&self, i: u64) -> Result<bytes::Bytes, SourceError> {
        let (start, len) = self.range(i);
        read(self.path, self.file.clone(), start, len).await
    }
}

/// Uploads a file that is longer than one part.
pub(super) async fn upload(
    upload: &Upload<'_>,
    path: &Path,
    file: Arc<File>,
    size: u64,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), SourceError> {
    let cut = Cut { path, file, size, length: PART.max(size.div_ceil(MAX_PARTS)) };
    if upload.create_only && exists(upload).await {
        return Err(SourceError::Exists { what: upload.name.into() });
    }
    if let Some((id, stored)) = unfinished(upload, &cut).await? {
        tracing::info!(what = upload.name, parts = stored.len(), of = cut.parts(), "taking up an unfinished upload");
        match run(upload, &id, &cut, &stored, progress).await {
            // Another process has ended it meanwhile, or put other parts there: from the beginning, then.
            Err(error @ (SourceError::NotFound { .. } | SourceError::Corrupt { .. })) => {
                tracing::info!(what = upload.name, %error, "the unfinished upload is of no use: beginning anew");
            }
            other => return other,
        }
    }
    let start = || async {
        upload
            .client
            .create_multipart_upload()
            .bucket(upload.bucket)
            .key(upload.key)
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .send()
            .await
            .map_err(|e| client::failure(upload.name, e))
    };
    let started = upload.retry.run(Label::S3, upload.name, 0, start).await?;
    let id = started.upload_id().ok_or_else(|| SourceError::Corrupt {
        what: upload.name.into(),
        detail: "the store began an upload without naming it".into(),
    })?;
    run(upload, id, &cut, &BTreeMap::new(), progress).await
}

/// Whether the key is taken, found out before gigabytes are sent in vain. Completion asks again, and that counts.
async fn exists(upload: &Upload<'_>) -> bool {
    upload.client.head_object().bucket(upload.bucket).key(upload.key).send().await.is_ok()
}

/// Sends what is missing and completes. What fails for good leaves no parts behind; what can't be reached leaves them to the
/// next try.
async fn run(
    upload: &Upload<'_>,
    id: &str,
    cut: &Cut<'_>,
    stored: &BTreeMap<u64, Stored>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), SourceError> {
    let done = async {
        let parts = send_parts(upload, id, cut, stored, progress).await?;
        complete(upload, id, cut.size, parts).await
    };
    let outcome = done.await;
    match &outcome {
        Ok(()) => {}
        Err(SourceError::Unavailable { .. }) => {
            tracing::info!(what = upload.name, "the parts that were sent stay: the next try goes on from there");
        }
        Err(_) => abort(upload, id).await,
    }
    outcome
}

async fn abort(upload: &Upload<'_>, id: &str) {
    let client = upload.client;
    let abort = client.abort_multipart_upload().bucket(upload.bucket).key(upload.key).upload_id(id).send().await;
    if let Err(error) = abort {
        let failure = client::failure(upload.name, error).error();
        if !matches!(failure, SourceError::NotFound { .. }) {
            tracing::warn!(what = upload.name, %failure, "the parts of a failed upload could not be removed");
        }
    }
}

/// An unfinished upload of this very file, and its parts. Whatever the store does not tell is no reason to fail.
async fn unfinished(
    upload: &Upload<'_>,
    cut: &Cut<'_>,
) -> Result<Option<(String, BTreeMap<u64, Stored>)>, SourceError> {
    let list = upload.client.list_multipart_uploads().bucket(upload.bucket).prefix(upload.key);
    let listed = match list.send().await {
        Ok(listed) => listed,
        Err(error) => {
            let failure = client::failure(upload.name, error).error();
            tracing::debug!(what = upload.name, %failure, "unfinished uploads can't be listed: none is taken up");
            return Ok(None);
        }
    };
    let ours = listed.uploads().iter().filter(|found| found.key() == Some(upload.key));
    let mut found: Vec<(Option<SystemTime>, &str)> = ours
        .filter_map(|found| {
            let initiated = found.initiated().and_then(|at| SystemTime::try_from(*at).ok());
            Some((initiated, found.upload_id()?))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    let now = SystemTime::now();
    for (initiated, id) in found.into_iter().take(MAX_UNFINISHED) {
        if let Some(stored) = stored_parts(upload, id, cut).await
            && are_ours(cut, &stored).await?
        {
            return Ok(Some((id.to_owned(), stored)));
        }
        let age = initiated.and_then(|at| now.duration_since(at).ok());
        if age.is_some_and(|age| age > STALE) {
            tracing::info!(
                what = upload.name,
                hours = age.unwrap_or_default().as_secs() / 3600,
                "removing a stale upload"
            );
            abort(upload, id).await;
        }
    }
    Ok(None)
}

/// The parts of an upload by number, from 0; `None`: it can't be ours, or the store does not tell checksums.
async fn stored_parts(upload: &Upload<'_>, id: &str, cut: &Cut<'_>) -> Option<BTreeMap<u64, Stored>> {
    let (mut stored, mut marker) = (BTreeMap::new(), None::<String>);
    loop {
        let list = upload.client.list_parts().bucket(upload.bucket).key(upload.key).upload_id(id);
        let page = list.set_part_number_marker(marker.clone()).send().await.ok()?;
        for part in page.parts() {
            let i = u64::try_from(part.part_number()?).ok()?.checked_sub(1).filter(|i| *i < cut.parts())?;
            let size = u64::try_from(part.size()?).ok().filter(|size| *size == cut.range(i).1)?;
            let checksum = part.checksum_sha256()?.to_owned();
            stored.insert(i, Stored { size, checksum, etag: part.e_tag().map(str::to_owned) });
        }
        let next = page.next_part_number_marker().map(str::to_owned);
        if page.is_truncated() != Some(true) || next.is_none() || next == marker {
            return Some(stored).filter(|stored| !stored.is_empty());
        }
        marker = next;
    }
}

/// Whether every part is what ours would be.
async fn are_ours(cut: &Cut<'_>, stored: &BTreeMap<u64, Stored>) -> Result<bool, SourceError> {
    for (i, part) in stored {
        if checksum(&cut.read(*i).await?) != part.checksum {
            return Ok(false);
        }
    }
    Ok(true)
}

fn completed(i: u64, etag: Option<&str>, checksum: Option<&str>) -> CompletedPart {
    CompletedPart::builder()
        .part_number(i32::try_from(i + 1).unwrap_or(i32::MAX))
        .set_e_tag(etag.map(str::to_owned))
        .set_checksum_sha256(checksum.map(str::to_owned))
        .build()
}

async fn send_parts(
    upload: &Upload<'_>,
    id: &str,
    cut: &Cut<'_>,
    stored: &BTreeMap<u64, Stored>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Vec<CompletedPart>, SourceError> {
    let mut parts: Vec<CompletedPart> = futures::stream::iter(0..cut.parts())
        .map(|i| async move {
            if let Some(there) = stored.get(&i) {
                progress(there.size);
                return Ok(completed(i, there.etag.as_deref(), Some(&there.checksum)));
            }
            let bytes = cut.read(i).await?;
            let (len, checksum) = (bytes.len() as u64, checksum(&bytes));
            let send = || async {
                upload
                    .client
                    .upload_part()
                    .bucket(upload.bucket)
                    .key(upload.key)
                    .upload_id(id)
                    .part_number(i32::try_from(i + 1).unwrap_or(i32::MAX))
                    .checksum_algorithm(ChecksumAlgorithm::Sha256)
                    .checksum_sha256(&checksum)
                    .body(bytes.clone().into())
                    .send()
                    .await
                    .map_err(|e| client::failure(upload.name, e))
            };
            let sent = upload.retry.run(Label::S3, upload.name, len, send).await?;
            progress(len);
            // A store that keeps checksums says so, and has them compared again at the end.
            let kept = sent.checksum_sha256();
            if kept.is_some_and(|kept| kept != checksum) {
                let detail = format!("part {} arrived as something else", i + 1);
                return Err(SourceError::Corrupt { what: upload.name.into(), detail });
            }
            Ok::<_, SourceError>(completed(i, sent.e_tag(), kept))
        })
        .buffer_unordered(CONCURRENT)
        .try_collect()
        .await?;
    parts.sort_by_key(CompletedPart::part_number);
    Ok(parts)
}

async fn complete(upload: &Upload<'_>, id: &str, size: u64, parts: Vec<CompletedPart>) -> Result<(), SourceError> {
    let expected = composite(&parts);
    let all = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
    let tries = AtomicU32::new(0);
    let complete = || async {
        tries.fetch_add(1, Ordering::Relaxed);
        upload
            .client
            .complete_multipart_upload()
            .bucket(upload.bucket)
            .key(upload.key)
            .upload_id(id)
            .set_if_none_match(upload.create_only.then(|| "*".to_owned()))
            .multipart_upload(all.clone())
            .send()
            .await
            .map_err(|e| put_failure(upload.name, upload.create_only, e))
    };
    let patient = RetryPolicy {
        attempt: upload.retry.attempt.max(COMPLETION),
        total: upload.retry.total.max(2 * COMPLETION),
        ..upload.retry.clone()
    };
    let done = match patient.run(Label::S3, upload.name, 0, complete).await {
        Ok(done) => done,
        // The upload is gone, or the key taken, because it has been completed: by a try whose answer was lost, or by another process
        // with the same file.
        Err(error @ (SourceError::NotFound { .. } | SourceError::Exists { .. })) => {
            let may_be_ours = matches!(error, SourceError::NotFound { .. }) || tries.into_inner() > 1;
            return match &expected {
                Some(checksum) if may_be_ours && upload.has_arrived(size, checksum).await => Ok(()),
                _ => Err(error),
            };
        }
        Err(error) => return Err(error),
    };
    match (done.checksum_sha256(), expected) {
        (Some(said), Some(expected)) if said.contains('-') && said != expected => {
            let detail = "the store put the parts together to something else; push it again".into();
            Err(SourceError::Corrupt { what: upload.name.into(), detail })
        }
        _ => Ok(()),
    }
}

/// The checksum of an object made of parts: SHA-256 over theirs, and their number. `None` where the store keeps none.
fn composite(parts: &[CompletedPart]) -> Option<String> {
    let base64 = base64::engine::general_purpose::STANDARD;
    let mut all = Vec::with_capacity(parts.len() * 32);
    for part in parts {
        all.extend(base64.decode(part.checksum_sha256()?).ok()?);
    }
    Some(format!("{}-{}", base64.encode(Digest::of(&all).0), parts.len()))
}
