//! Uploads to a store that keeps checksums of parts: versitygw, a real S3 server of its own making.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials as Keys, Region};
use aws_sdk_s3::types::ChecksumAlgorithm;
use clip_csi::source::policy::SourceConfig;
use clip_csi::source::{S3Keys, SourceError};
use common::gateway::Gateway;
use common::noise;

const PART: usize = 16 << 20;

/// The SDK itself, to do what another process did.
fn client(gateway: &Gateway) -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let S3Keys { access_key, secret_key, .. } = gateway.keys();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(gateway.endpoint())
        .force_path_style(true)
        .credentials_provider(Keys::new(access_key, secret_key, None, None, "test"))
        .http_client(aws_smithy_http_client::Builder::new().build_http());
    Client::from_conf(config.build())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_another_process_began_is_finished_and_checked() {
    let test = "an_upload_that_another_process_began_is_finished_and_checked";
    let Some(gateway) = Gateway::or_skip(test, "store").await else { return };
    let (client, whole) = (client(&gateway), noise(2 * PART + 77, 5));
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("file");
    std::fs::write(&file, &whole).unwrap();
    let begun = client.create_multipart_upload().bucket("store").key("a.clip");
    let begun = begun.checksum_algorithm(ChecksumAlgorithm::Sha256).send().await.unwrap();
    let part = client.upload_part().bucket("store").key("a.clip").upload_id(begun.upload_id().unwrap());
    let part = part.part_number(1).checksum_algorithm(ChecksumAlgorithm::Sha256);
    part.body(whole[..PART].to_vec().into()).send().await.unwrap();

    let (credentials, target) = (gateway.credentials(), gateway.location("store", "a.clip"));
    let sources = common::sources(true, SourceConfig::default());
    let done = AtomicU64::new(0);
    let count = |n: u64| {
        done.fetch_add(n, Ordering::SeqCst);
    };
    sources.put(&target, &file, true, &credentials, &count).await.unwrap();
    assert_eq!(done.load(Ordering::SeqCst), whole.len() as u64);
    let unfinished = client.list_multipart_uploads().bucket("store").send().await.unwrap();
    assert_eq!(unfinished.uploads().len(), 0, "the upload that was begun is the one that was finished");
    let source = sources.open(&target, &credentials).await.unwrap();
    assert!(source.read_range(0..whole.len() as u64).await.unwrap() == whole);
    let again = sources.put(&target, &file, true, &credentials, &|_| {}).await;
    assert!(matches!(again, Err(SourceError::Exists { .. })), "{again:?}");
}
