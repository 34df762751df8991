//! Archives in registries: pushed, found beside their image, pulled, kept as a store and collected; against Debian's
//! docker-registry, which has no referrers API, and go-containerregistry's, which has one.

mod common;

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use clip_csi::archive::Version;
use clip_csi::build::BuildError;
use clip_csi::build::provider::{ImageServiceConfig, Provider, PullPolicy, Request};
use clip_csi::build::store::{ArchiveStore, Facts, Records, VolumeRecord};
use clip_csi::metrics::metrics;
use clip_csi::source::policy::{RegistryEntry, SourceConfig};
use clip_csi::source::{ArtifactRef, Credentials, ImageRef, Labels, Location, Sources, Subject};
use clip_csi::units::{Compression, Digest, Platform};
use common::http_fault::{Reply, Server};
use common::image::TestImage;
use common::layers::{self, Layer};
use common::registry::{self, Registry, push_layout_to};
use common::s3::S3;
use common::skip::{self, needs, skipped};

const DAY: Duration = Duration::from_secs(24 * 3600);
const V2: &str = "application/vnd.beam.clip.archive.v2";

/// go-containerregistry's registry, built once per run, or why it can't be.
static GO_REGISTRY: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
    skip::no_go().map_or(Ok(()), Err)?;
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("referrers_registry");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/referrers");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(".").current_dir(source).env("GOTOOLCHAIN", "local");
    let output = build.output().expect("go build can be started");
    assert!(output.status.success(), "go build: {}", String::from_utf8_lossy(&output.stderr));
    Ok(program)
});

/// A registry of either kind.
enum Place {
    Debian(Registry),
    Go { child: Child, host: String },
}

impl Place {
    fn debian() -> Self {
        Self::Debian(Registry::start())
    }

    fn go(program: &Path) -> Self {
        let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut host = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut host).unwrap();
        Self::Go { child, host: host.trim().to_owned() }
    }

    fn host(&self) -> &str {
        match self {
            Self::Debian(registry) => registry.host(),
            Self::Go { host, .. } => host,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Go { child, .. } = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the same against each registry that is there; the missing ones are noted.
async fn everywhere(test: &str, body: impl AsyncFn(&Place)) {
    match skip::installed("docker-registry") {
        true => body(&Place::debian()).await,
        false => skipped(test, "docker-registry is not installed"),
    }
    match GO_REGISTRY.as_deref() {
        Ok(program) => body(&Place::go(program)).await,
        Err(why) => skipped(test, why),
    }
}

fn run(args: &[&str]) -> std::process::Output {
    // Nobody's credentials but those that a test names.
    Command::new(env!("CARGO_BIN_EXE_clip-csi")).args(args).env("DOCKER_CONFIG", "/nonexistent").output().unwrap()
}

fn clip_csi(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "clip-csi {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(args: &[&str], code: i32, words: &[&str]) {
    let out = run(args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

/// An image in a registry, and an index of it.
struct Image {
    dir: tempfile::TempDir,
    reference: String,
    manifest: Digest,
}

impl Image {
    async fn pushed(place: &Place, repository: &str, content: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layer = Layer::new(Compression::Gzip).dir("etc", 0o755).file("etc/content", content);
        layers::write_layout(&dir.path().join("layout"), vec![layer]);
        let manifest = push_layout_to(place.host(), &dir.path().join("layout"), repository, "v1").await;
        let reference = format!("{}/{repository}:v1", place.host());
        clip_csi(&["index", &reference, "-o", dir.path().join("app.clip").to_str().unwrap()]);
        Self { dir, reference, manifest }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn archive(&self) -> PathBuf {
        self.dir.path().join("app.clip")
    }

    fn name(&self) -> String {
        ArchiveStore::archive_name(&self.manifest, &"linux/amd64".parse().unwrap(), Version::V2)
    }

    fn image(&self) -> ImageRef {
        self.reference.parse().unwrap()
    }
}

fn configured(host: &str) -> SourceConfig {
    let entry = RegistryEntry { plain_http: true, ..Default::default() };
    SourceConfig { registries: [(host.to_owned(), entry)].into(), ..Default::default() }
}

fn node(host: &str, store: Option<String>) -> (tempfile::TempDir, Provider) {
    let dir = tempfile::tempdir().unwrap();
    let config = ImageServiceConfig {
        archive_dir: dir.path().to_owned(),
        archive_store: store,
        clip_version: Some(2),
        ..Default::default()
    };
    let provider = Provider::new(config, common::sources(false, configured(host))).unwrap();
    (dir, provider)
}

fn request(image: &str) -> Request {
    Request {
        image: image.parse().unwrap(),
        platform: "linux/amd64".parse().unwrap(),
        version: Version::V2,
        pull_policy: PullPolicy::Always,
        credentials: Credentials::default(),
    }
}

fn shell() -> Sources {
    common::sources(true, SourceConfig::default())
}

fn lookups(result: &str) -> u64 {
    metrics().referrer_lookups.with_label_values(&[result]).get()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_was_pushed_beside_its_image_is_pulled_and_used_by_nodes() {
    everywhere("an_index_that_was_pushed_beside_its_image_is_pulled_and_used_by_nodes", async |place| {
        let image = Image::pushed(place, "team/app", b"hello").await;
        let before = node(place.host(), None).1.provide(&request(&image.reference)).await.unwrap();
        assert_eq!(before.from, "built", "nothing lies beside it yet");

        let repository = format!("{}/team/app", place.host());
        let said = clip_csi(&["push", &image.path("app.clip"), &repository]);
        assert!(said.contains(&format!("beside the image {}", image.manifest)), "{said}");
        // Again, by the image's own tag, which stays the image's.
        let again = clip_csi(&["push", &image.path("app.clip"), &image.reference]);
        let artifact = |said: &str| said.split('@').nth(1).unwrap()[..71].parse::<Digest>().unwrap();
        assert_eq!(artifact(&said), artifact(&again), "the same archive is the same artifact");

        clip_csi(&["pull", &image.reference, "-o", &image.path("pulled.clip")]);
        let bytes = std::fs::read(image.archive()).unwrap();
        assert_eq!(std::fs::read(image.path("pulled.clip")).unwrap(), bytes);
        let mode = |name: &str| std::fs::metadata(image.path(name)).unwrap().permissions().mode();
        assert_eq!(mode("pulled.clip"), mode("app.clip"), "as readable as one that was made here");
        let exact = format!("oci://{repository}@{}", artifact(&said));
        clip_csi(&["pull", &exact, "-o", &image.path("exact.clip")]);
        assert_eq!(std::fs::read(image.path("exact.clip")).unwrap(), bytes);
        assert_eq!(clip_csi(&["cat", &exact, "/etc/content"]), "hello", "read where it lies, by range");

        let (_dir, provider) = node(place.host(), None);
        let found = provider.provide(&request(&image.reference)).await.unwrap();
        assert_eq!(found.from, "referrer");
        assert_eq!(std::fs::read(found.pin.unwrap().path()).unwrap(), bytes);
        // A volume that names the artifact: on a node, and anonymously.
        let sources = common::node_sources(&[place.host()]);
        let location = Location::parse_archive(&exact).unwrap();
        let none = Credentials::default();
        assert_eq!(sources.scope(&location, &none).await.unwrap(), clip_csi::source::Scope::Public);
        let source = sources.open(&location, &none).await.unwrap();
        assert_eq!(source.stat().await.unwrap().size, bytes.len() as u64);
        assert_eq!(source.read_range(3..40).await.unwrap(), bytes[3..40]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_of_a_directory_lies_under_a_tag_that_no_image_has() {
    everywhere("an_archive_of_a_directory_lies_under_a_tag_that_no_image_has", async |place| {
        let image = Image::pushed(place, "app", b"x").await;
        let (tree, archive) = (image.path("tree"), image.path("tree.clip"));
        std::fs::create_dir(&tree).unwrap();
        // Longer than one piece of an upload.
        let big = common::noise((18 << 20) + 5, 7);
        std::fs::write(format!("{tree}/big"), &big).unwrap();
        std::fs::write(format!("{tree}/small"), b"small").unwrap();
        clip_csi(&["archive", &tree, "-o", &archive]);
        let tagged = format!("oci://{}/app:tree", place.host());
        fails(&["push", &archive, &format!("{}/app", place.host())], 2, &["refers to no image", ":TAG"]);
        fails(&["push", &archive, &image.reference], 2, &["is not an archive and is not replaced"]);
        fails(&["pull", &tagged, "-o", &image.path("no.clip")], 4, &["app:tree"]);
        clip_csi(&["push", &archive, &tagged]);
        fails(&["push", "--create-only", &archive, &tagged], 1, &["exists already"]);
        assert_eq!(clip_csi(&["cat", &tagged, "/small"]), "small");
        clip_csi(&["pull", &tagged, "-o", &image.path("back.clip")]);
        assert_eq!(std::fs::read(image.path("back.clip")).unwrap(), std::fs::read(&archive).unwrap());
        fails(&["ls", &format!("oci://{}", image.reference), "/"], 2, &["is no CLIP archive"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_other_layers_or_another_place_is_not_taken_for_the_images() {
    everywhere("an_index_of_other_layers_or_another_place_is_not_taken_for_the_images", async |place| {
        let (image, other) =
            (Image::pushed(place, "app", b"right").await, Image::pushed(place, "other", b"wrong").await);
        let sources = shell();
        let repository = sources.repository(place.host(), "app", &Credentials::default()).await.unwrap();
        let subject = repository.subject(&image.manifest).await.unwrap();
        let labels = Labels { title: "evil.clip".into(), image: Some(image.manifest), ..Labels::default() };
        // Bytes that are no archive, and an index of another image, each as if of this one.
        let broken = image.dir.path().join("broken");
        std::fs::write(&broken, b"no archive").unwrap();
        for file in [&broken, &other.archive()] {
            repository.push(file, Version::V2, &labels, Some(&subject), None, &|_| {}).await.unwrap();
        }
        let before = lookups("rejected");
        let provided = node(place.host(), None).1.provide(&request(&image.reference)).await.unwrap();
        assert_eq!(provided.from, "built");
        assert!(lookups("rejected") > before);
        fails(&["pull", &image.reference, "-o", &image.path("x.clip")], 4, &["no archive lies beside"]);
        // A good one among them, older than the others: it is found.
        clip_csi(&["push", &image.path("app.clip"), &format!("{}/app", place.host())]);
        for file in [&broken, &other.archive()] {
            let labels = Labels { created: Some(SystemTime::now() + Duration::from_secs(60)), ..labels.clone() };
            repository.push(file, Version::V2, &labels, Some(&subject), Some("newer"), &|_| {}).await.unwrap();
        }
        clip_csi(&["pull", &image.reference, "-o", &image.path("good.clip")]);
        assert_eq!(std::fs::read(image.path("good.clip")).unwrap(), std::fs::read(image.archive()).unwrap());
        // For a node too.
        assert_eq!(node(place.host(), None).1.provide(&request(&image.reference)).await.unwrap().from, "referrer");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_at_the_same_time_do_not_take_each_other_out_of_the_fallback_tag() {
    needs!("docker-registry");
    let place = Place::debian();
    let image = Image::pushed(&place, "app", b"x").await;
    let repository = shell().repository(place.host(), "app", &Credentials::default()).await.unwrap();
    let subject = repository.subject(&image.manifest).await.unwrap();
    let files: Vec<PathBuf> = (0..6)
        .map(|i| {
            let file = image.dir.path().join(format!("{i}"));
            std::fs::write(&file, format!("archive {i}")).unwrap();
            file
        })
        .collect();
    let push = |file: PathBuf| {
        let (repository, subject) = (repository.clone(), subject.clone());
        tokio::spawn(async move {
            let labels = Labels { title: "a".into(), ..Labels::default() };
            repository.push(&file, Version::V2, &labels, Some(&subject), None, &|_| {}).await.unwrap().digest
        })
    };
    let pushed = futures::future::join_all(files.into_iter().map(push)).await;
    let mut pushed: Vec<Digest> = pushed.into_iter().map(Result::unwrap).collect();
    let mut found: Vec<Digest> =
        repository.archives_of(&image.manifest, Version::V2).await.unwrap().into_iter().map(|a| a.digest).collect();
    pushed.sort_by_key(|d| d.0);
    found.sort_by_key(|d| d.0);
    assert_eq!(found, pushed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_with_a_login_works_and_without_it_is_denied_without_showing_it() {
    needs!("docker-registry");
    let registry = Registry::start_with_login();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("tree")).unwrap();
    std::fs::write(path("tree/a"), b"a").unwrap();
    clip_csi(&["archive", &path("tree"), "-o", &path("tree.clip")]);
    let auth = serde_json::json!({"username": registry::USER, "password": registry::PASSWORD});
    std::fs::write(path("docker.json"), serde_json::json!({"auths": {registry.host(): auth}}).to_string()).unwrap();
    let dest = format!("oci://{}/private:t", registry.host());
    let denied = run(&["-vvv", "push", &path("tree.clip"), &dest]);
    assert_eq!(denied.status.code(), Some(5));
    let docker = path("docker.json");
    let pushed = run(&["-vvv", "push", "--docker-config", &docker, &path("tree.clip"), &dest]);
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
    for output in [denied, pushed] {
        let said = [output.stdout, output.stderr].concat();
        assert!(!String::from_utf8_lossy(&said).contains(registry::PASSWORD));
    }
    assert_eq!(clip_csi(&["cat", "--docker-config", &docker, &dest, "/a"]), "a");
}

/// A registry that holds one image, as a handler: `None` for what else it is asked.
fn image_server(image: &TestImage, path: &str) -> Option<Reply> {
    let path = path.split('?').next().unwrap();
    if path.contains("/manifests/") && !path.contains("/manifests/sha256-") {
        let digest = image.digest().to_string();
        return Some(Reply::ok(image.manifest.clone()).with("docker-content-digest", &digest));
    }
    let blob = image.blobs().find(|bytes| path.ends_with(&Digest::of(bytes).to_string()))?;
    Some(Reply::ok(blob.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_that_fails_is_counted_and_the_index_built() {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_mode(0o644);
    tar.append_data(&mut header, "a", &b"a"[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let kind = "application/vnd.oci.image.layer.v1.tar";
    let mut image = TestImage::new(vec![(kind, tar.clone())]);
    let diff_ids = serde_json::json!({"type": "layers", "diff_ids": [Digest::of(&tar).to_string()]});
    let config = serde_json::json!({"os": "linux", "architecture": "amd64", "rootfs": diff_ids});
    image.config = Bytes::from(config.to_string());
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["config"]["digest"] = Digest::of(&image.config).to_string().into();
    manifest["config"]["size"] = image.config.len().into();
    image.manifest = Bytes::from(manifest.to_string());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let server = Server::start(move |seen, _| {
        if seen.path.contains("/referrers/") {
            count.fetch_add(1, Ordering::SeqCst);
            return Reply::status(403);
        }
        image_server(&image, &seen.path).unwrap_or(Reply::status(404))
    })
    .await;
    let host = server.url("").trim_start_matches("http://").trim_end_matches('/').to_owned();
    let (dir, provider) = node(&host, None);
    let before = lookups("error");
    let reference = format!("{host}/app:v1");
    let provided = provider.provide(&request(&reference)).await.unwrap();
    assert_eq!(provided.from, "built");
    assert!(lookups("error") > before);
    // The archive goes, and the next one asks no more for a while.
    let first = asked.load(Ordering::SeqCst);
    drop(provided);
    for entry in std::fs::read_dir(dir.path()).unwrap().map(Result::unwrap) {
        if entry.path().is_file() {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    assert_eq!(provider.provide(&request(&reference)).await.unwrap().from, "built");
    assert_eq!((first, asked.load(Ordering::SeqCst)), (1, 1));
}

#[tokio::test]
async fn referrers_are_read_over_pages_of_the_same_repository_and_by_type() {
    let subject = Digest::of(b"image");
    let entry = |name: &str, kind: &str| serde_json::json!({"mediaType": common::image::MANIFEST, "digest": Digest::of(name.as_bytes()).to_string(), "size": 1, "artifactType": kind});
    let index = |entries: Vec<serde_json::Value>| {
        Bytes::from(serde_json::json!({"schemaVersion": 2, "manifests": entries}).to_string())
    };
    for (link, pages) in [("</v2/a/referrers/next>; rel=\"next\"", 2), ("<http://127.0.0.2:1/x>; rel=\"next\"", 1)] {
        let (first, second) =
            (index(vec![entry("sbom", "application/spdx+json"), entry("one", V2)]), index(vec![entry("two", V2)]));
        let server = Server::start(move |seen, _| match seen.path.as_str() {
            path if path.ends_with("/next") => Reply::ok(second.clone()),
            path if path.contains("/referrers/") => Reply::ok(first.clone()).with("link", link),
            _ => Reply::status(404),
        })
        .await;
        let host = server.url("").trim_start_matches("http://").trim_end_matches('/').to_owned();
        let repository = shell().repository(&host, "a", &Credentials::default()).await.unwrap();
        let found = repository.archives_of(&subject, Version::V2).await;
        let seen = server.seen();
        let asked = |part: &str| seen.iter().filter(|s| s.path.contains(part)).count();
        assert_eq!(asked("/referrers/"), pages, "{link}");
        assert!(seen[0].path.ends_with(&format!("{subject}?artifactType={V2}")), "{seen:?}");
        if pages == 2 {
            // What is listed is gone: nothing is found, which is no error. What is of another type is not even asked for.
            assert_eq!(found.unwrap(), []);
            assert_eq!(asked("/manifests/"), 2);
        } else {
            assert_eq!(found.unwrap_err().kind(), "refused");
        }
    }
}

#[tokio::test]
async fn a_registry_that_keeps_referrers_itself_gets_no_fallback_tag() {
    for keeps in [true, false] {
        let server = Server::start(move |seen, _| match (seen.method.as_str(), seen.path.as_str()) {
            ("HEAD", _) => Reply::status(200),
            ("PUT", _) if keeps => Reply::status(201).with("oci-subject", "sha256:0"),
            ("PUT", _) => Reply::status(201),
            _ => Reply::status(404),
        })
        .await;
        let host = server.url("").trim_start_matches("http://").trim_end_matches('/').to_owned();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        std::fs::write(&file, b"a").unwrap();
        let repository = shell().repository(&host, "a", &Credentials::default()).await.unwrap();
        let subject = Subject { digest: Digest::of(b"i"), size: 1, media_type: common::image::MANIFEST.into() };
        let _ = repository.push(&file, Version::V2, &Labels::default(), Some(&subject), None, &|_| {}).await;
        let tagged = server.seen().iter().any(|s| s.method == "PUT" && s.path.contains("/manifests/sha256-"));
        assert_eq!(tagged, !keeps);
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_goes_on_where_the_registry_is() {
    let whole = common::noise((40 << 20) + 3, 3);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a");
    std::fs::write(&file, &whole).unwrap();
    let kept = Arc::new(std::sync::Mutex::new(Vec::<u8>::new()));
    let (have, failed) = (kept.clone(), Arc::new(AtomicUsize::new(0)));
    let failures = failed.clone();
    let server = Server::start(move |seen, _| {
        let mut have = have.lock().unwrap();
        let range = |have: &[u8]| format!("0-{}", have.len().saturating_sub(1));
        match (seen.method.as_str(), seen.path.as_str()) {
            ("HEAD", path) if path.ends_with(&Digest::of(b"{}").to_string()) => Reply::status(200),
            ("POST", _) => Reply::status(202).with("location", "/v2/a/blobs/uploads/1?state=x"),
            ("PATCH", _) => {
                let start = seen.header("content-range").and_then(|r| r.split('-').next()?.parse::<usize>().ok());
                if start != Some(have.len()) {
                    return Reply::status(416);
                }
                // The second piece arrives by half, and the answer is lost.
                if have.len() == 16 << 20 && failures.fetch_add(1, Ordering::SeqCst) == 0 {
                    have.extend_from_slice(&seen.body[..5 << 20]);
                    return Reply::status(503);
                }
                have.extend_from_slice(&seen.body);
                Reply::status(202).with("range", &range(&have)).with("location", "/v2/a/blobs/uploads/1?state=y")
            }
            ("GET", path) if path.contains("/uploads/") => Reply::status(204).with("range", &range(&have)),
            ("PUT", path) if path.contains("/uploads/") => {
                let digest = Digest::of(&have).to_string().replace(':', "%3A");
                Reply::status(if path.contains(&digest) { 201 } else { 400 })
            }
            ("PUT", _) => Reply::status(201),
            _ => Reply::status(404),
        }
    })
    .await;
    let host = server.url("").trim_start_matches("http://").trim_end_matches('/').to_owned();
    let repository = shell().repository(&host, "a", &Credentials::default()).await.unwrap();
    let done = AtomicUsize::new(0);
    let count = |n: u64| {
        done.fetch_add(n as usize, Ordering::SeqCst);
    };
    let pushed = repository.push(&file, Version::V1, &Labels::default(), None, Some("t"), &count).await.unwrap();
    assert_eq!((pushed.blob, pushed.size), (Digest::of(&whole), whole.len() as u64));
    assert!(*kept.lock().unwrap() == whole);
    assert_eq!(done.load(Ordering::SeqCst), whole.len());
    let sent: usize = server.seen().iter().filter(|s| s.method == "PATCH").map(|s| s.body.len()).sum();
    assert_eq!(sent, whole.len() + (11 << 20), "only what was not taken is sent again");
}

#[derive(Debug, Default)]
struct MemoryRecords(std::sync::Mutex<Vec<VolumeRecord>>);

#[async_trait::async_trait]
impl Records for MemoryRecords {
    async fn create(&self, record: &VolumeRecord) -> Result<Option<VolumeRecord>, BuildError> {
        self.0.lock().unwrap().push(record.clone());
        Ok(None)
    }
    async fn get(&self, _: &str) -> Result<Option<VolumeRecord>, BuildError> {
        Ok(None)
    }
    async fn delete(&self, id: &str) -> Result<(), BuildError> {
        self.0.lock().unwrap().retain(|record| record.id != id);
        Ok(())
    }
    async fn list(&self) -> Result<Vec<VolumeRecord>, BuildError> {
        Ok(self.0.lock().unwrap().clone())
    }
}

fn record(name: &str) -> VolumeRecord {
    VolumeRecord {
        id: format!("v1-{}", "0".repeat(32)),
        name: "pvc".into(),
        parameters: Digest::of(b""),
        image: None,
        manifest_digest: None,
        archive: Some(name.into()),
        created: 0,
        image_bytes: None,
        attributes: None,
    }
}

/// What every store does: keeps what a record names, and collects the rest after its time.
async fn keeps_and_collects(store: &ArchiveStore, image: &Image) {
    let (name, file, of) = (image.name(), image.archive(), image.image());
    assert_eq!(store.find(&name).await.unwrap(), None);
    assert!(store.put(&name, None, &of).await.is_err(), "nothing is there to be used");
    store.put(&name, Some(&file), &of).await.unwrap();
    store.put(&name, Some(&file), &of).await.unwrap();
    let location = store.find(&name).await.unwrap().unwrap();
    let to = image.dir.path().join("fetched.clip");
    assert!(store.fetch(&location, &to).await.unwrap());
    assert_eq!(std::fs::read(&to).unwrap(), std::fs::read(&file).unwrap());

    let now = SystemTime::now();
    assert_eq!(store.collect(now, DAY).await.unwrap().removed, Vec::<String>::new(), "it is young");
    store.records().create(&record(&name)).await.unwrap();
    let late = now + DAY * 2;
    let kept = store.collect(late, DAY).await.unwrap();
    assert_eq!((kept.archives, kept.removed, kept.failed), (1, vec![], vec![]), "a volume names it");
    store.records().delete(&record(&name).id).await.unwrap();
    // Two controllers at once.
    let (a, b) = tokio::join!(store.collect(late, DAY), store.collect(late, DAY));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert!(a.failed.is_empty() && b.failed.is_empty(), "{a:?} {b:?}");
    assert!(a.removed == [name.clone()] || b.removed == [name.clone()], "{a:?} {b:?}");
    assert_eq!(store.find(&name).await.unwrap(), None);
    store.put(&name, Some(&file), &of).await.unwrap();
    assert!(store.find(&name).await.unwrap().is_some(), "and it comes again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_a_registry_keeps_and_collects_archives() {
    everywhere("a_store_in_a_registry_keeps_and_collects_archives", async |place| {
        let image = Image::pushed(place, "team/app", b"x").await;
        let url = format!("oci://{}/clip/store", place.host());
        let store = ArchiveStore::open(&url, common::sources(false, configured(place.host()))).unwrap();
        assert!(store.needs_records() && store.records().list().await.is_err());
        let store = store.with_records(Arc::new(MemoryRecords::default()));
        keeps_and_collects(&store, &image).await;
        // A node that has the store configured takes it from there.
        let (_dir, provider) = node(place.host(), Some(url));
        assert_eq!(provider.provide(&request(&image.reference)).await.unwrap().from, "store");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_of_objects_keep_and_collect_archives() {
    needs!("docker-registry");
    let place = Place::debian();
    let image = Image::pushed(&place, "team/app", b"x").await;
    let dir = image.path("store");
    let store = ArchiveStore::open(&format!("file://{dir}"), shell()).unwrap();
    keeps_and_collects(&store, &image).await;
    let left: Vec<Location> = shell().list(&Location::File(dir.into()), &Credentials::default()).await.unwrap();
    assert_eq!(left.len(), 2, "the archive and its use: {left:?}");
}

/// The keys of a store are the process's own, from its environment: the test runs itself again with them there.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_s3_keeps_and_collects_archives() {
    needs!("docker-registry");
    let s3 = S3::start().await;
    if std::env::var_os("AWS_ACCESS_KEY_ID").is_none() {
        let keys = s3.keys();
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_store_in_s3_keeps_and_collects_archives", "--nocapture"])
            .env("AWS_ACCESS_KEY_ID", keys.access_key)
            .env("AWS_SECRET_ACCESS_KEY", keys.secret_key)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&[out.stdout, out.stderr].concat()));
        return;
    }
    s3.bucket("store");
    let place = Place::debian();
    let image = Image::pushed(&place, "team/app", b"x").await;
    let store = ArchiveStore::open(&s3.url("store", "prefix"), shell()).unwrap();
    keeps_and_collects(&store, &image).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_beside_images_puts_what_other_nodes_find_there() {
    everywhere("a_store_beside_images_puts_what_other_nodes_find_there", async |place| {
        let image = Image::pushed(place, "team/app", b"x").await;
        let store = ArchiveStore::open("referrer", common::sources(false, configured(place.host()))).unwrap();
        store.put(&image.name(), Some(&image.archive()), &image.image()).await.unwrap();
        store.put(&image.name(), Some(&image.archive()), &image.image()).await.unwrap();
        let repository = shell().repository(place.host(), "team/app", &Credentials::default()).await.unwrap();
        let found = repository.archives_of(&image.manifest, Version::V2).await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].platform(), Some("linux/amd64".parse::<Platform>().unwrap()));
        assert_eq!(found[0].span(), Facts::of(&image.archive()).await.unwrap().span);
        assert_eq!(repository.artifact(&ArtifactRef::Digest(found[0].digest)).await.unwrap(), found[0]);
        assert_eq!(store.collect(SystemTime::now() + DAY * 9, DAY).await.unwrap().removed, Vec::<String>::new());
        let (_dir, provider) = node(place.host(), Some("referrer".into()));
        assert_eq!(provider.provide(&request(&image.reference)).await.unwrap().from, "referrer");
        let layout: ImageRef = format!("oci:{}", image.path("layout")).parse().unwrap();
        let error = store.put(&image.name(), Some(&image.archive()), &layout).await.unwrap_err();
        assert!(error.to_string().contains("oci://host/repository"), "{error}");
    })
    .await;
}
