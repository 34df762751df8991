//! Uploads to a store that keeps checksums of parts: versitygw, a real S3 server of its own making.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials as Keys, Region};
use aws_sdk_s3::types::ChecksumAlgorithm;
use clip_csi::source::policy::SourceConfig;
use clip_csi::source::{Location, S3Keys, SourceError};
use common::gateway::Gateway;
use common::noise;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

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

/// Passes bytes on both ways, and cuts the connection in place of the first answer to a request whose first line holds all of `words`.
async fn losing_the_answer_to(server: String, words: &'static [&'static str]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let lost = Arc::new(AtomicBool::new(false));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let upstream = TcpStream::connect(&server).await.unwrap();
            let lost = lost.clone();
            tokio::spawn(async move {
                let ((mut from, mut to), (mut back, mut answer)) = (client.into_split(), upstream.into_split());
                let hit = Arc::new(AtomicBool::new(false));
                let (seen, mut buffer) = (hit.clone(), vec![0; 64 << 10]);
                let forth = tokio::spawn(async move {
                    while let Ok(n @ 1..) = from.read(&mut buffer).await {
                        let line = buffer[..n].split(|byte| *byte == b'\r').next().unwrap_or_default();
                        let line = String::from_utf8_lossy(line).into_owned();
                        if words.iter().all(|word| line.contains(word)) && !lost.swap(true, Ordering::SeqCst) {
                            seen.store(true, Ordering::SeqCst);
                        }
                        if answer.write_all(&buffer[..n]).await.is_err() {
                            return;
                        }
                    }
                });
                let mut buffer = vec![0; 64 << 10];
                while let Ok(n @ 1..) = back.read(&mut buffer).await {
                    if hit.load(Ordering::SeqCst) || to.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                }
                forth.abort();
            });
        }
    });
    address
}

/// The store has done what it was asked for, and the next try meets that.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_is_lost_has_succeeded() {
    let test = "a_write_whose_answer_is_lost_has_succeeded";
    let Some(gateway) = Gateway::or_skip(test, "store").await else { return };
    let place = tempfile::tempdir().unwrap();
    let credentials = gateway.credentials();
    let sources = common::sources(true, SourceConfig::default());
    for (key, len, words) in
        [("parts.clip", PART + 77, &["POST ", "uploadId="][..]), ("small.clip", 1000, &["PUT ", "small.clip"][..])]
    {
        for create_only in [false, true] {
            let whole = noise(len, 6 + u64::from(create_only));
            let file = place.path().join("file");
            std::fs::write(&file, &whole).unwrap();
            let server = gateway.endpoint().trim_start_matches("http://").to_owned();
            let through = losing_the_answer_to(server, words).await;
            let key = format!("{create_only}-{key}");
            let mut target = gateway.location("store", &key);
            let Location::S3 { endpoint, .. } = &mut target else { panic!("{target:?}") };
            *endpoint = format!("http://{through}");
            sources.put(&target, &file, create_only, &credentials, &|_| {}).await.unwrap();
            assert!(std::fs::read(gateway.path("store", &key)).unwrap() == whole);
            let again = sources.put(&target, &file, true, &credentials, &|_| {}).await;
            assert!(matches!(again, Err(SourceError::Exists { .. })), "somebody else's, or an earlier one: {again:?}");
        }
    }
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
