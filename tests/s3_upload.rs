//! Uploads to a store that keeps checksums of parts: versitygw, a real S3 server of its own making.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials as Keys, Region};
use aws_sdk_s3::types::ChecksumAlgorithm;
use clip_csi::source::policy::SourceConfig;
use clip_csi::source::{Credentials, Location, S3Keys, SourceError};
use common::noise;
use common::skip::skipped;

const PART: usize = 16 << 20;

/// The program, where `.ci/setup test` has built it.
fn versitygw() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/clip-csi"));
    let dir = std::env::var_os("CLIP_CSI_BUILD_DIR").map(PathBuf::from).or_else(home)?;
    Some(dir.join("tools/versitygw-v1.8.0/versitygw")).filter(|program| program.is_file())
}

struct Gateway {
    child: Child,
    endpoint: String,
    dir: tempfile::TempDir,
}

impl Gateway {
    async fn start(program: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("data/store")).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let endpoint = format!("127.0.0.1:{port}");
        let child = Command::new(program)
            .args(["--access", "ACCESS", "--secret", "SECRET", "--port", &endpoint, "--quiet", "posix"])
            .arg(dir.path().join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let gateway = Self { child, endpoint: format!("http://{endpoint}"), dir };
        let give_up = Instant::now() + Duration::from_secs(60);
        while tokio::net::TcpStream::connect(&endpoint).await.is_err() {
            assert!(Instant::now() < give_up, "versitygw does not listen");
            // Nothing tells when a port will be open.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        gateway
    }

    fn client(&self) -> Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(&self.endpoint)
            .force_path_style(true)
            .credentials_provider(Keys::new("ACCESS", "SECRET", None, None, "test"))
            .http_client(aws_smithy_http_client::Builder::new().build_http());
        Client::from_conf(config.build())
    }

    fn at(&self, key: &str) -> Location {
        Location::S3 {
            endpoint: self.endpoint.clone(),
            region: "us-east-1".into(),
            bucket: "store".into(),
            key: key.into(),
            path_style: true,
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_another_process_began_is_finished_and_checked() {
    let Some(program) = versitygw() else {
        return skipped(
            "an_upload_that_another_process_began_is_finished_and_checked",
            "versitygw is not built (.ci/setup test does it where Go is there)",
        );
    };
    let gateway = Gateway::start(&program).await;
    let (client, whole) = (gateway.client(), noise(2 * PART + 77, 5));
    let file = gateway.dir.path().join("file");
    std::fs::write(&file, &whole).unwrap();
    let begun = client.create_multipart_upload().bucket("store").key("a.clip");
    let begun = begun.checksum_algorithm(ChecksumAlgorithm::Sha256).send().await.unwrap();
    let part = client.upload_part().bucket("store").key("a.clip").upload_id(begun.upload_id().unwrap());
    let part = part.part_number(1).checksum_algorithm(ChecksumAlgorithm::Sha256);
    part.body(whole[..PART].to_vec().into()).send().await.unwrap();

    let keys = S3Keys { access_key: "ACCESS".into(), secret_key: "SECRET".into(), session_token: None };
    let credentials = Credentials { s3: Some(keys.into()), ..Default::default() };
    let sources = common::sources(true, SourceConfig::default());
    let done = AtomicU64::new(0);
    let count = |n: u64| {
        done.fetch_add(n, Ordering::SeqCst);
    };
    sources.put(&gateway.at("a.clip"), &file, true, &credentials, &count).await.unwrap();
    assert_eq!(done.load(Ordering::SeqCst), whole.len() as u64);
    let unfinished = client.list_multipart_uploads().bucket("store").send().await.unwrap();
    assert_eq!(unfinished.uploads().len(), 0, "the upload that was begun is the one that was finished");
    let source = sources.open(&gateway.at("a.clip"), &credentials).await.unwrap();
    assert!(source.read_range(0..whole.len() as u64).await.unwrap() == whole);
    let again = sources.put(&gateway.at("a.clip"), &file, true, &credentials, &|_| {}).await;
    assert!(matches!(again, Err(SourceError::Exists { .. })), "{again:?}");
}
