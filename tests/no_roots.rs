//! A machine without any CA certificates, as a small container image is one: plain HTTP works, HTTPS says what to install.

mod common;

use std::process::Command;

use clip_csi::k8s::{self, KubeConfig};
use clip_csi::source::policy::{RegistryEntry, SourceConfig};
use clip_csi::source::{Credentials, ImageRef, Location};
use clip_csi::units::{Digest, Platform};
use common::image::TestImage;
use common::registry::Registry;
use common::s3::S3;
use common::skip::{self, needs};
use common::{noise, sources};

/// Set where the roots are hidden: the registry to ask, and a kubeconfig.
const INSIDE: &str = "CLIP_TEST_NO_ROOTS";

/// A program that finds no CA certificate.
fn without_roots(program: impl AsRef<std::ffi::OsStr>, empty: &std::path::Path) -> tokio::process::Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"AWS_")) {
        command.env_remove(name);
    }
    command.env("SSL_CERT_FILE", "/dev/null").env("SSL_CERT_DIR", empty).env("HOME", empty);
    command.into()
}

fn assert_one_line_with_the_remedy(stderr: &[u8]) {
    let text = String::from_utf8_lossy(stderr);
    assert!(!text.contains("panicked"), "{text}");
    assert!(text.contains("CA certificates") && text.contains("ca-certificates"), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_in_s3_are_read_over_plain_http_without_ca_certificates() {
    let (s3, empty) = (S3::start().await, tempfile::tempdir().unwrap());
    s3.put("archives", "no.clip", &[b'x'; 100]);
    let keys = s3.keys();
    let mut command = without_roots(env!("CARGO_BIN_EXE_clip-csi"), empty.path());
    command.env("AWS_ACCESS_KEY_ID", keys.access_key).env("AWS_SECRET_ACCESS_KEY", keys.secret_key);
    let output = command.args(["inspect", &s3.url("archives", "no.clip")]).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("not a CLIP archive") && !text.contains("panicked"), "{text}");
    assert!(s3.requests().iter().any(|request| request.contains("no.clip")));
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_over_https_without_ca_certificates_says_what_to_install() {
    needs!("docker-registry", "openssl");
    // Anything that speaks TLS: no request is ever sent.
    let (server, empty) = (Registry::start_with_tls(), tempfile::tempdir().unwrap());
    let archive = format!("s3://archives/a.clip?endpoint=https://{}&path-style=true", server.host());
    let mut command = without_roots(env!("CARGO_BIN_EXE_clip-csi"), empty.path());
    command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret");
    let output = command.args(["inspect", &archive]).output().await.unwrap();
    assert!(!output.status.success());
    assert_one_line_with_the_remedy(&output.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_over_https_without_ca_certificates_is_read_with_its_ca_file_alone() {
    needs!("docker-registry", "openssl");
    let (registry, empty) = (Registry::start_with_tls(), tempfile::tempdir().unwrap());
    registry.push("team/app", "v1", &TestImage::of_layer(noise(1000, 18))).await;
    let mut test = without_roots(std::env::current_exe().unwrap(), empty.path());
    let place = format!("{} {}", registry.host(), registry.ca_file().display());
    let output = test.args(["--exact", "inside_a_registry", "--nocapture"]).env(INSIDE, place).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("was asked"), "{text}");
}

/// A process of its own, without roots; by itself it does nothing.
#[tokio::test]
async fn inside_a_registry() {
    let Ok(place) = std::env::var(INSIDE) else { return };
    let (host, ca_file) = place.split_once(' ').unwrap();
    let resolve = async |ca_file: &str| {
        let entry = RegistryEntry { ca_file: Some(ca_file.into()), ..Default::default() };
        let config = SourceConfig { registries: [(host.to_owned(), entry)].into(), ..Default::default() };
        let image: ImageRef = format!("{host}/team/app:v1").parse().unwrap();
        let platform: Platform = "linux/amd64".parse().unwrap();
        common::sources(false, config).resolve(&image, &platform, &Credentials::default()).await
    };
    // A loopback registry is spoken to in plain HTTP unless its place or an own authority says otherwise.
    let blob = Location::Registry {
        registry: format!("https://{host}"),
        repository: "team/app".into(),
        digest: Digest::of(b"any"),
    };
    let entry = RegistryEntry::default();
    let sources = sources(false, SourceConfig { registries: [(host.to_owned(), entry)].into(), ..Default::default() });
    let read = async { sources.open(&blob, &Credentials::default()).await?.read_range(0..1).await };
    let error = read.await.unwrap_err().to_string();
    assert_one_line_with_the_remedy(error.as_bytes());
    resolve(ca_file).await.unwrap();
    let error = resolve("/dev/null").await.unwrap_err().to_string();
    assert!(error.contains("/dev/null") && error.contains("no CA certificates in PEM form"), "{error}");
    println!("the registry was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubernetes_api_without_ca_certificates_is_an_error_that_says_so() {
    let empty = tempfile::tempdir().unwrap();
    let mut test = without_roots(std::env::current_exe().unwrap(), empty.path());
    let args = ["--exact", "inside_a_cluster", "--nocapture"];
    let output = test.args(args).env(INSIDE, empty.path()).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("was asked"), "{text}");
}

/// A process of its own, without roots; by itself it does nothing.
#[tokio::test]
async fn inside_a_cluster() {
    let Ok(dir) = std::env::var(INSIDE) else { return };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let connect = async |server: &str| {
        let file = std::path::Path::new(&dir).join("kubeconfig");
        let text = format!(
            "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: k, user: u}}}}], \
             clusters: [{{name: k, cluster: {{server: '{server}'}}}}], users: [{{name: u, user: {{token: t}}}}]}}"
        );
        std::fs::write(&file, text).unwrap();
        k8s::connect(&KubeConfig { kubeconfig: Some(file), ..KubeConfig::default() }).await
    };
    let error = connect("https://127.0.0.1:1").await.unwrap_err().to_string();
    assert_one_line_with_the_remedy(error.as_bytes());
    assert!(error.contains("k8s.kubeconfig") && error.contains("certificate-authority"), "{error}");
    // Plain HTTP needs none.
    assert!(connect("http://127.0.0.1:1").await.unwrap().is_some());
    println!("the API was asked");
}
