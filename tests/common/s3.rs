//! An S3 server in this process: s3s over a temporary directory, one directory a bucket.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use clip_csi::source::{Credentials, Location, S3Keys};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;

const ACCESS_KEY: &str = "AKIATEST";
const SECRET_KEY: &str = "test-secret-key";

/// A server that lives as long as this guard. Signatures are checked.
#[derive(Debug)]
pub struct S3 {
    endpoint: String,
    root: tempfile::TempDir,
    requests: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl S3 {
    /// Starts one on the current runtime.
    pub async fn start() -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).expect("the directory is there"));
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = requests.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                // Head and body go out in two writes; a client that acknowledges late would wait 40 ms for each answer.
                let _ = stream.set_nodelay(true);
                let (service, log) = (service.clone(), log.clone());
                let logged = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let range = request.headers().get("range").and_then(|v| v.to_str().ok()).unwrap_or("-").to_owned();
                    let line = format!("{} {} {range}", request.method(), request.uri());
                    log.lock().expect("no test panicked with the log").push(line);
                    hyper::service::Service::call(&service, request)
                });
                connections.spawn(async move {
                    let _ =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), logged).await;
                });
            }
        });
        Self { endpoint, root, requests, task }
    }

    /// `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Makes a bucket.
    pub fn bucket(&self, bucket: &str) {
        std::fs::create_dir_all(self.root.path().join(bucket)).expect("the bucket can be made");
    }

    /// Puts an object (and its bucket) there, past the protocol.
    pub fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        let path = self.path(bucket, key);
        std::fs::create_dir_all(path.parent().expect("a key lies in a bucket")).expect("it can be made");
        std::fs::write(path, bytes).expect("it can be written");
    }

    /// Puts a file there as another name of it.
    pub fn put_file(&self, bucket: &str, key: &str, file: &Path) {
        let path = self.path(bucket, key);
        std::fs::create_dir_all(path.parent().expect("a key lies in a bucket")).expect("it can be made");
        std::fs::hard_link(file, path).expect("it can be linked");
    }

    /// The file behind an object.
    pub fn path(&self, bucket: &str, key: &str) -> PathBuf {
        self.root.path().join(bucket).join(key)
    }

    /// Where an object lies, for sources.
    pub fn location(&self, bucket: &str, key: &str) -> Location {
        Location::S3 {
            endpoint: self.endpoint.clone(),
            region: "us-east-1".into(),
            bucket: bucket.into(),
            key: key.into(),
            path_style: true,
        }
    }

    /// Where an object lies, for people.
    pub fn url(&self, bucket: &str, key: &str) -> String {
        self.location(bucket, key).to_string()
    }

    /// Its keys.
    pub fn keys(&self) -> S3Keys {
        S3Keys { access_key: ACCESS_KEY.into(), secret_key: SECRET_KEY.into(), session_token: None }
    }

    /// Its keys, as a volume brings them.
    pub fn credentials(&self) -> Credentials {
        Credentials { s3: Some(Arc::new(self.keys())), ..Default::default() }
    }

    /// `METHOD URI RANGE` of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no test panicked with the log").clone()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.task.abort();
    }
}
