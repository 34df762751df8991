//! versitygw over a temporary directory: a real S3 server of another make, and a process of its own. It keeps checksums of
//! parts, and reads of a range cost what the range does (the server in `s3.rs` reads a whole object for its ETag each time).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clip_csi::source::{Credentials, Location, S3Keys};

const ACCESS_KEY: &str = "ACCESS";
const SECRET_KEY: &str = "SECRET";

/// A server that lives as long as this guard. Signatures are checked.
#[derive(Debug)]
pub struct Gateway {
    child: Child,
    endpoint: String,
    dir: tempfile::TempDir,
}

impl Gateway {
    /// Starts one with an empty bucket, or notes that `test` is skipped: `.ci/setup` builds the server where Go is there.
    pub async fn or_skip(test: &str, bucket: &str) -> Option<Self> {
        match program() {
            Some(program) => Some(Self::start(&program, bucket).await),
            None => {
                super::skip::skipped(test, "versitygw is not built (.ci/setup test does it where Go is there)");
                None
            }
        }
    }

    async fn start(program: &Path, bucket: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(bucket)).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let child = Command::new(program)
            .args(["--access", ACCESS_KEY, "--secret", SECRET_KEY, "--port", &address, "--quiet", "posix"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let gateway = Self { child, endpoint: format!("http://{address}"), dir };
        let give_up = Instant::now() + Duration::from_secs(60);
        while tokio::net::TcpStream::connect(&address).await.is_err() {
            assert!(Instant::now() < give_up, "versitygw does not listen");
            // Nothing tells when a port will be open.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        gateway
    }

    /// `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Puts a file there as another name of it, past the protocol.
    pub fn put_file(&self, bucket: &str, key: &str, file: &Path) {
        std::fs::hard_link(file, self.path(bucket, key)).expect("it can be linked");
    }

    /// The file behind an object.
    pub fn path(&self, bucket: &str, key: &str) -> PathBuf {
        self.dir.path().join(bucket).join(key)
    }

    /// Where an object lies.
    pub fn location(&self, bucket: &str, key: &str) -> Location {
        Location::S3 {
            endpoint: self.endpoint.clone(),
            region: "us-east-1".into(),
            bucket: bucket.into(),
            key: key.into(),
            path_style: true,
        }
    }

    /// Its keys.
    pub fn keys(&self) -> S3Keys {
        S3Keys { access_key: ACCESS_KEY.into(), secret_key: SECRET_KEY.into(), session_token: None }
    }

    /// Its keys, as a volume brings them.
    pub fn credentials(&self) -> Credentials {
        Credentials { s3: Some(self.keys().into()), ..Default::default() }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, where `.ci/setup` has built it.
fn program() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/clip-csi"));
    let dir = std::env::var_os("CLIP_CSI_BUILD_DIR").map(PathBuf::from).or_else(home)?;
    Some(dir.join("tools/versitygw-v1.8.0/versitygw")).filter(|program| program.is_file())
}
