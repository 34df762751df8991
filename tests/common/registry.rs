//! Debian's docker-registry (distribution 2.8) as a child process, and pushing to it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use clip_csi::units::Digest;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};

use super::image::TestImage;

/// The user of [`Registry::start_with_login`].
pub const USER: &str = "reader";
/// Its password.
pub const PASSWORD: &str = "secret-pw";
/// bcrypt of [`PASSWORD`].
const PASSWORD_HASH: &str = "$2b$05$abcdefghijklmnopqrstuutaz/SHXsrvqy/ChnunBIcMuq4PCR.gG";

/// A registry that lives as long as this guard.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    host: String,
    access: Access,
    config: serde_json::Value,
    dir: tempfile::TempDir,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Open,
    Login,
    Tls,
}

impl Registry {
    /// Open to everybody.
    pub fn start() -> Self {
        Self::launch(Access::Open)
    }

    /// Open to everybody, over TLS: its certificate is signed by the authority in [`Registry::ca_file`]. Needs openssl.
    pub fn start_with_tls() -> Self {
        Self::launch(Access::Tls)
    }

    /// Wants [`USER`] and [`PASSWORD`] (HTTP Basic) for everything.
    pub fn start_with_login() -> Self {
        Self::launch(Access::Login)
    }

    fn launch(access: Access) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = serde_json::json!({
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": dir.path().join("data")}, "delete": {"enabled": true}},
            "http": {"addr": "127.0.0.1:0"},
        });
        if access == Access::Login {
            let htpasswd = dir.path().join("htpasswd");
            std::fs::write(&htpasswd, format!("{USER}:{PASSWORD_HASH}\n")).expect("htpasswd can be written");
            config["auth"] = serde_json::json!({"htpasswd": {"realm": "test", "path": htpasswd}});
        }
        if access == Access::Tls {
            certify(dir.path());
            config["http"]["tls"] =
                serde_json::json!({"certificate": dir.path().join("leaf.pem"), "key": dir.path().join("leaf.key")});
        }
        let (child, host) = serve(dir.path(), &config);
        Self { child, host, access, config, dir }
    }

    /// Ends it, as a crash would. Its data stays.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after [`Self::stop`], at the same address with the same data.
    pub fn start_again(&mut self) {
        self.config["http"]["addr"] = self.host.as_str().into();
        (self.child, _) = serve(self.dir.path(), &self.config);
    }

    /// The file of a blob.
    pub fn blob_file(&self, digest: &Digest) -> std::path::PathBuf {
        let hex = digest.hex();
        self.data().join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(&hex).join("data")
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// `127.0.0.1:port/repository:tag`.
    pub fn image(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.host)
    }

    /// The authority that signed its certificate, in PEM form.
    pub fn ca_file(&self) -> std::path::PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Where it keeps its data.
    pub fn data(&self) -> std::path::PathBuf {
        self.dir.path().join("data")
    }

    /// Pushes a blob.
    pub async fn push_blob(&self, repository: &str, bytes: Bytes) -> Digest {
        let digest = Digest::of(&bytes);
        let (client, reference) = self.client(repository, "x").await;
        client.push_blob(&reference, bytes, &digest.to_string()).await.expect("the blob can be pushed");
        digest
    }

    /// Pushes a manifest or an index under a tag (or a digest).
    pub async fn push_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: Bytes) -> Digest {
        let digest = Digest::of(&bytes);
        let (client, reference) = self.client(repository, tag).await;
        let media_type = media_type.parse().expect("a media type");
        client.push_manifest_raw(&reference, bytes, media_type).await.expect("the manifest can be pushed");
        digest
    }

    /// Pushes an image.
    pub async fn push(&self, repository: &str, tag: &str, image: &TestImage) -> Digest {
        for bytes in image.blobs() {
            self.push_blob(repository, bytes.clone()).await;
        }
        self.push_manifest(repository, tag, super::image::MANIFEST, image.manifest.clone()).await
    }

    /// Pushes the first image of an OCI layout, with every blob that the layout holds.
    pub async fn push_layout(&self, dir: &Path, repository: &str, tag: &str) -> Digest {
        let read = |path: std::path::PathBuf| Bytes::from(std::fs::read(path).expect("the layout can be read"));
        let index: serde_json::Value = serde_json::from_slice(&read(dir.join("index.json"))).expect("an index");
        let descriptor = &index["manifests"][0];
        let top: Digest = descriptor["digest"].as_str().and_then(|d| d.parse().ok()).expect("a digest");
        let blobs = dir.join("blobs/sha256");
        for entry in std::fs::read_dir(&blobs).expect("the layout can be read") {
            self.push_blob(repository, read(entry.expect("an entry").path())).await;
        }
        let media_type = descriptor["mediaType"].as_str().unwrap_or(super::image::MANIFEST);
        self.push_manifest(repository, tag, media_type, read(blobs.join(top.hex()))).await
    }

    async fn client(&self, repository: &str, tag: &str) -> (Client, Reference) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = ClientConfig { protocol: ClientProtocol::Http, ..Default::default() };
        if self.access == Access::Tls {
            let data = std::fs::read(self.ca_file()).expect("the authority can be read");
            config.protocol = ClientProtocol::Https;
            config.extra_root_certificates = vec![Certificate { encoding: CertificateEncoding::Pem, data }];
        }
        let client = Client::new(config);
        let reference: Reference = format!("{}/{repository}:{tag}", self.host).parse().expect("a reference");
        let auth = match self.access {
            Access::Login => RegistryAuth::Basic(USER.into(), PASSWORD.into()),
            Access::Open | Access::Tls => RegistryAuth::Anonymous,
        };
        client.auth(&reference, &auth, RegistryOperation::Push).await.expect("the registry lets us in");
        (client, reference)
    }
}

/// Makes an authority, and a certificate of it for 127.0.0.1.
fn certify(dir: &Path) {
    let make = |name: &str, more: &[&str]| {
        let common = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
        let (key, certificate, subject) = (format!("{name}.key"), format!("{name}.pem"), format!("/CN=test {name}"));
        let names = ["-keyout", &key, "-out", &certificate, "-subj", &subject];
        let output = Command::new("openssl").args(common).args(names).args(more).current_dir(dir).output();
        let output = output.expect("openssl can be started");
        assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    };
    make("ca", &[]);
    let signed = ["-CA", "ca.pem", "-CAkey", "ca.key"];
    let extensions = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"];
    make("leaf", &[signed, extensions].concat());
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The process, and where it listens.
fn serve(dir: &Path, config: &serde_json::Value) -> (Child, String) {
    // JSON is YAML.
    let file = dir.join("config.yml");
    std::fs::write(&file, config.to_string()).expect("the configuration can be written");
    let mut child = Command::new("docker-registry")
        .arg("serve")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("docker-registry can be started (apt-get install docker-registry)");
    let log = BufReader::new(child.stderr.take().expect("it is piped"));
    let (say, hear) = mpsc::channel();
    std::thread::spawn(move || {
        // Read to the end, or the registry would stop at a full pipe.
        for line in log.lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on ") {
                let address: String = rest.chars().take_while(|c| !matches!(c, '"' | ' ' | ',')).collect();
                let _ = say.send(address);
            }
        }
    });
    match hear.recv_timeout(Duration::from_secs(20)) {
        Ok(host) => (child, host),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            panic!("docker-registry does not say where it listens: {error}");
        }
    }
}

/// Pushes the first image of an OCI layout to an open registry that is spoken to in plain HTTP, in the plainest way: not
/// every registry can be pushed to by `oci_client`.
pub async fn push_layout_to(host: &str, dir: &Path, repository: &str, tag: &str) -> Digest {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let read = |path: std::path::PathBuf| std::fs::read(path).expect("the layout can be read");
    let index: serde_json::Value = serde_json::from_slice(&read(dir.join("index.json"))).expect("an index");
    let top: Digest = index["manifests"][0]["digest"].as_str().and_then(|d| d.parse().ok()).expect("a digest");
    let blobs = dir.join("blobs/sha256");
    let base = url::Url::parse(&format!("http://{host}/v2/{repository}/")).expect("a URL");
    for entry in std::fs::read_dir(&blobs).expect("the layout can be read") {
        let bytes = read(entry.expect("an entry").path());
        let begun = client.post(base.join("blobs/uploads/").expect("a URL")).send().await.expect("an upload begins");
        let location = begun.headers().get("location").and_then(|v| v.to_str().ok()).expect("it says where");
        let mut url = begun.url().join(location).expect("a URL");
        url.query_pairs_mut().append_pair("digest", &Digest::of(&bytes).to_string());
        let done = client.put(url).header("content-type", "application/octet-stream").body(bytes).send().await;
        assert_eq!(done.expect("the blob can be pushed").status().as_u16(), 201);
    }
    let put = client.put(base.join(&format!("manifests/{tag}")).expect("a URL"));
    let put = put.header("content-type", super::image::MANIFEST).body(read(blobs.join(top.hex()))).send().await;
    assert_eq!(put.expect("the manifest can be pushed").status().as_u16(), 201);
    top
}
